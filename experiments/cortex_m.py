"""The C files of a student on emulated microcontrollers: whether the values are right, flash, RAM, instructions.

Claim: both kinds, c and c-int8, run on Cortex-M4F, M7 and M55. c-int8 gives the bits that it gives on the host, c is within
1e-4 of it; c-int8 fits in 110 KB of flash and 64 KB of RAM.

    apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
    w2s export RUN --out MODEL --kind c --kind c-int8 --calibration BANK
    python experiments/cortex_m.py MODEL/model_c MODEL/model_c_int8 --audio speech.wav

QEMU counts instructions, each of which takes as long as any other: that is no time, and no energy; on silicon neither was
measured. Needs about ten seconds for each directory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from w2s_jax import SAMPLING_RATE, audio
from w2s_jax.errors import UsageError, W2SError

HERE = Path(__file__).parent / "cortex_m"
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Board:
    """A machine of QEMU's.

    Attributes:
        machine: its name there.
        flags: of the compiler, for its processor.
        flash, flash_bytes, ram, ram_bytes: where its memory lies, as far as a program may use it here.
    """

    machine: str
    flags: tuple[str, ...]
    flash: int
    flash_bytes: int
    ram: int
    ram_bytes: int


_M4, _M7 = (("-mfloat-abi=hard", f"-mfpu=fpv{version}-sp-d16", f"-mcpu=cortex-m{cpu}") for version, cpu in ((4, 4), (5, 7)))
#: Their memory is as large as that of microcontrollers of their kind, not as the boards' own.
BOARDS = {
    "Cortex-M4F": Board("mps2-an386", _M4, 0, 1 << 20, 0x20000000, 1 << 18),
    "Cortex-M7": Board("mps2-an500", _M7, 0, 1 << 20, 0x20000000, 1 << 18),
    "Cortex-M55": Board("mps3-an547", ("-mfloat-abi=hard", "-mcpu=cortex-m55"), 0, 1 << 19, 0x20000000, 1 << 18),
}


def run(source: Path, samples: np.ndarray, boards: dict[str, Board] = BOARDS) -> dict[str, dict]:
    """Build and run a model's C files on the host and on emulated boards.

    Args:
        source: a directory with w2s_model.c and w2s_model.h.
        samples: int16 [T] at 16 kHz.
        boards: name → board.

    Returns:
        "host" and the boards' names → ``values`` (word → float32 array: ``whole``, the values of the recording, and ``stream``,
        those of a stream). For boards also bytes of code and weights, ``flash``, and of memory for a whole recording and for a
        stream of 5 s with a hop of 0.25 s, ``whole_ram`` and ``stream_ram``, the recording and the program around it left out;
        and instructions per second of audio, ``whole_instructions`` and ``stream_instructions``, and ``read_instructions`` of
        each reading.

    Raises:
        UsageError: a tool is missing, or there are no such files.
        W2SError: the program does not compile or ends with an error; with what was printed.
    """
    if not (source / "w2s_model.c").is_file():
        raise UsageError(f"no C files at {source}: expected w2s_model.c and w2s_model.h, which w2s export --kind c writes")
    with tempfile.TemporaryDirectory() as place:
        build = Path(place)
        numbers = ",".join(map(str, samples))
        (build / "recording.h").write_text(
            f"#define RECORDING_SAMPLES {len(samples)}\nstatic const int16_t recording[] = {{{numbers}}};\n"
        )
        files = [HERE / "program.c", source / "w2s_model.c"]
        include = ["-I", build, "-I", source]
        _call("cc", *FLAGS, *include, *files, "-lm", "-o", build / "host")
        results = {"host": {"values": _read(_call(build / "host"))[0]}}
        for name, board in boards.items():
            layout = {key: f"{getattr(board, key):#x}" for key in ("flash", "flash_bytes", "ram", "ram_bytes")}
            (build / "memory.ld").write_text(Template((HERE / "memory.ld").read_text()).substitute(layout))
            flags = [*FLAGS, *board.flags, "-mthumb", "-ffunction-sections", "-fdata-sections", *include]
            for file in files:
                _call("arm-none-eabi-gcc", *flags, "-c", file, "-o", build / f"{file.stem}.o")
            objects = [build / f"{file.stem}.o" for file in files]
            link = [
                "-nostartfiles",
                "-Wl,--gc-sections",
                "-T",
                build / "memory.ld",
                *objects,
                "-lm",
                "-o",
                build / "program.elf",
            ]
            _call("arm-none-eabi-gcc", *board.flags, "-mthumb", *link)
            said = _call(
                *("qemu-system-arm", "-machine", board.machine, "-icount", "shift=0", "-display", "none", "-monitor", "none"),
                *("-serial", "none", "-semihosting-config", "enable=on,target=native", "-kernel", build / "program.elf"),
            )
            values, costs = _read(said)
            text, data, bss = map(int, _call("arm-none-eabi-size", build / "w2s_model.o").splitlines()[1].split()[:3])
            per_tick = 2_000_000 / costs["ticks_of_2_million"]
            results[name] = {
                "values": values,
                "flash": text + data,
                "whole_ram": data + bss + costs["whole_bytes"],
                "stream_ram": data + bss + costs["stream_bytes"],
                "whole_instructions": round(costs["whole_ticks"] * per_tick * SAMPLING_RATE / len(samples)),
                "stream_instructions": round(costs["stream_ticks"] * per_tick * SAMPLING_RATE / len(samples)),
                "read_instructions": round(costs["read_ticks"] * per_tick),
            }
    return results


def _call(*command: object) -> str:
    """What a command prints, stdout and stderr (semihosting writes there)."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    except FileNotFoundError as error:
        raise UsageError(f"{command[0]} is not installed; see the head of {__file__}") from error
    if done.returncode:
        raise W2SError(f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def _read(said: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Values and costs from the program's lines."""
    lines = {word: numbers.split() for word, numbers in re.findall(r"^(\w+)((?: [0-9a-f]{8})+)$", said, re.MULTILINE)}
    if "whole" not in lines:
        raise W2SError(f"the program printed no values: {said[-2000:]}")
    words = {word: np.array([int(number, 16) for number in numbers], np.uint32) for word, numbers in lines.items()}
    values = {word: words.pop(word).view(np.float32) for word in ("whole", "stream") if word in words}
    return values, {word: int(numbers[0]) for word, numbers in words.items()}


def main(arguments: list[str] | None = None) -> dict:
    """Run the command line; returns what it prints with --json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="DIR", help="with w2s_model.c and w2s_model.h")
    parser.add_argument("--audio", type=Path, help="a recording, of which the first second is used; default: noise")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.audio:
        samples = np.rint(audio.load(options.audio)[:SAMPLING_RATE] * 32767).clip(-32768, 32767).astype(np.int16)
    else:
        samples = (3000 * np.random.default_rng(0).standard_normal(SAMPLING_RATE)).clip(-32768, 32767).astype(np.int16)
    report: dict = {}
    for model in options.models:
        results = run(model, samples)
        host = results.pop("host")["values"]
        for result in results.values():
            values = result.pop("values")
            result["difference"] = max(float(np.abs(values[word] - host[word]).max()) for word in host)
        report[str(model)] = results
    if options.json:
        print(json.dumps(report))
        return report
    print("flash and RAM in bytes, instructions in millions per second of audio; a stream of 5 s, hop 0.25 s\n")
    print("| model | emulated processor | flash | RAM, whole | RAM, stream | whole | stream | difference |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for model, results in report.items():
        for name, result in results.items():
            millions = [f"{result[key] / 1e6:.1f}" for key in ("whole_instructions", "stream_instructions")]
            numbers = [str(result[key]) for key in ("flash", "whole_ram", "stream_ram")]
            print(f"| {' | '.join([model, name, *numbers, *millions, format(result['difference'], '.1e')])} |")
    return report


if __name__ == "__main__":
    try:
        main()
    except W2SError as error:
        sys.exit(f"error: {error}")
