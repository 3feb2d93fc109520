import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import audio, containers
from w2s_jax.errors import UsageError

RATE = 16_000


@pytest.fixture(autouse=True)
def strict():
    """A warning is an error unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sine(hertz, seconds=1.0, rate=RATE, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def speechlike(seconds=1.0, rate=RATE):
    """Harmonics of 120 Hz that decay, under a slow envelope: within what every lossy codec keeps."""
    envelope = np.sin(np.pi * np.arange(round(seconds * rate)) / (seconds * rate)) ** 2
    return envelope * sum(sine(120 * k, seconds, rate, 0.3 / k) for k in range(1, 12))


def wav_bytes(wave, rate=RATE, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, **{"format": "WAV", **options})
    return bytearray(buffer.getvalue())


def save(path, data):
    path.write_bytes(bytes(data))
    return path


# --- formats -----------------------------------------------------------------------------------------------------------

# Tolerance: largest relative RMS difference from the original. Half a step of s16 is 1.5e-5 of full scale, of u8 4e-3;
# the lossy figures are round numbers above what libsndfile 1.2.2 gives.
FORMATS = [
    ("WAV", "PCM_U8", 3e-2),
    ("WAV", "PCM_16", 2e-4),
    ("WAV", "PCM_24", 2e-6),
    ("WAV", "PCM_32", 1e-6),
    ("WAV", "FLOAT", 1e-6),
    ("WAV", "DOUBLE", 1e-6),
    ("WAV", "ULAW", 3e-2),
    ("WAV", "ALAW", 3e-2),
    ("WAV", "IMA_ADPCM", 3e-2),
    ("WAV", "MS_ADPCM", 3e-2),
    ("RF64", "PCM_16", 2e-4),
    ("W64", "PCM_16", 2e-4),
    ("WAVEX", "PCM_16", 2e-4),
    ("AIFF", "PCM_16", 2e-4),
    ("AU", "PCM_16", 2e-4),
    ("CAF", "PCM_16", 2e-4),
    ("NIST", "PCM_16", 2e-4),
    ("FLAC", "PCM_16", 2e-4),
    ("OGG", "VORBIS", 0.1),
    ("OGG", "OPUS", 0.15),
    ("MP3", "MPEG_LAYER_III", 0.1),
]


@pytest.mark.parametrize("format, subtype, tolerance", FORMATS)
def test_every_format_gives_the_same_signal(tmp_path, format, subtype, tolerance):
    wave = speechlike()
    soundfile.write(tmp_path / "x.bin", wave, RATE, format=format, subtype=subtype)  # the extension says nothing
    read = audio.load(tmp_path / "x.bin")
    assert read.dtype == np.float32 and read.ndim == 1
    assert len(wave) <= len(read) <= len(wave) + 2100  # ADPCM pads its last block
    error = read[: len(wave)] - wave
    assert np.sqrt(np.mean(error**2) / np.mean(wave**2)) < tolerance
    assert audio.duration(tmp_path / "x.bin") == pytest.approx(len(read) / RATE, abs=1e-3)


@pytest.mark.parametrize("name", ["x.mp3", "x.raw", "x.vox", "x.flac", "x", "x.txt"])
def test_the_extension_does_not_matter(tmp_path, name):
    wave = speechlike(0.2).astype(np.float32)
    read = audio.load(save(tmp_path / name, wav_bytes(wave, subtype="FLOAT")))
    np.testing.assert_array_equal(read, wave)


def test_levels_are_kept_beyond_full_scale(tmp_path):
    wave = sine(100, amplitude=1.5).astype(np.float32)
    assert np.abs(audio.load(save(tmp_path / "x.wav", wav_bytes(wave, subtype="FLOAT")))).max() == wave.max()


@pytest.mark.parametrize("wave", [np.zeros(500), np.full(500, 0.7), np.eye(1, 500, 250)[0], np.full(500, 1e-42)])
def test_silence_dc_click_and_denormals_are_audio(tmp_path, wave):
    read = audio.load(save(tmp_path / "x.wav", wav_bytes(wave, subtype="FLOAT")))
    np.testing.assert_array_equal(read, wave.astype(np.float32))


# --- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 44_101, 48_000, 96_000, 192_000, 1_000_000])
def test_resampling_keeps_amplitude_and_phase(tmp_path, rate):
    path = save(tmp_path / "x.wav", wav_bytes(sine(1000, rate=rate), rate, subtype="FLOAT"))
    read = audio.load(path)
    assert len(read) == RATE
    inner = slice(800, -800)  # the filter rings at the edges
    np.testing.assert_allclose(read[inner], sine(1000)[inner], atol=1e-4)
    np.testing.assert_array_equal(audio.resample(sine(1000, rate=rate).astype(np.float32), rate), read)


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_a_tone_above_the_new_band_vanishes(tmp_path, rate):
    read = audio.load(save(tmp_path / "x.wav", wav_bytes(sine(10_000, rate=rate), rate, subtype="FLOAT")))
    assert np.sqrt(np.mean(read[800:-800] ** 2)) < 0.5 / np.sqrt(2) * 10 ** (-60 / 20)


def test_resampling_against_scipy():
    signal = pytest.importorskip("scipy.signal")
    wave = speechlike(1.0, 48_000)
    expected = signal.resample_poly(wave, 1, 3)
    np.testing.assert_allclose(audio.resample(wave, 48_000)[800:-800], expected[800:-800], atol=1e-3)


def test_resample_refuses_what_is_not_a_waveform():
    for wave in (np.zeros((2, 100), np.float32), np.zeros(100, np.int16)):
        with pytest.raises(UsageError, match="expected a waveform"):
            audio.resample(wave, 8000)
    with pytest.raises(UsageError, match="sampling rate"):
        audio.resample(np.zeros(100), 0)
    assert audio.resample(np.zeros(0), 8000).shape == (0,)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_absurd_rates(tmp_path, rate):
    data = wav_bytes(np.zeros(1000))
    data[24:28] = struct.pack("<I", rate)
    with pytest.raises(audio.UnreadableAudioError, match=f"{rate} Hz"):
        audio.load(save(tmp_path / "x.wav", data))


# --- channels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 6, 8, 64])
def test_mixdown_is_the_mean(tmp_path, channels):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, channels))
    path = save(tmp_path / "x.wav", wav_bytes(wave, subtype="DOUBLE", format="WAVEX"))
    np.testing.assert_allclose(audio.load(path), wave.mean(axis=1), atol=1e-6)


def test_one_channel_of_many_is_no_cancellation(tmp_path):
    wave = np.zeros((3000, 8))
    wave[:, 3] = sine(200, 3000 / RATE)
    np.testing.assert_allclose(audio.load(save(tmp_path / "x.wav", wav_bytes(wave))), wave[:, 3] / 8, atol=1e-4)


def test_cancelling_channels_warn(tmp_path):
    wave = speechlike()
    path = save(tmp_path / "x.wav", wav_bytes(np.stack([wave, -0.95 * wave], axis=1)))
    with pytest.warns(audio.AudioWarning, match=r"2 channels of .*x\.wav cancel"):
        audio.load(path)


# --- parts and blocks --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([16_000, 44_100, 8_000]),
    frames=st.integers(1, 30_000),
    block=st.floats(0.001, 3),
    chunk=st.sampled_from([64, 1000, 2**18]),
)
def test_blocks_do_not_depend_on_their_size(tmp_path_factory, rate, frames, block, chunk):
    path = tmp_path_factory.mktemp("blocks") / "x.wav"
    save(path, wav_bytes(np.random.default_rng(frames).uniform(-1, 1, (frames, 2)), rate))
    if round(frames * RATE / rate) == 0:
        return
    whole = audio.load(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "_CHUNK", chunk)
        parts = list(audio.blocks(path, block_seconds=block))
    size = max(1, round(block * RATE))
    assert all(len(part) == size for part in parts[:-1]) and 1 <= len(parts[-1]) <= size
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert abs(len(whole) - frames * RATE / rate) <= 0.5


@pytest.mark.parametrize("format, subtype", [("WAV", "PCM_16"), ("WAV", "GSM610"), ("FLAC", None), ("OGG", "VORBIS")])
def test_start_and_end(tmp_path, format, subtype):
    soundfile.write(tmp_path / "x", speechlike(2), RATE, format=format, subtype=subtype)  # GSM cannot seek
    whole = audio.load(tmp_path / "x")
    np.testing.assert_array_equal(audio.load(tmp_path / "x", 0.5, 1.25), whole[8000:20000])
    np.testing.assert_array_equal(audio.load(tmp_path / "x", 1.5), whole[24000:])
    np.testing.assert_array_equal(audio.load(tmp_path / "x", None, 99), whole)
    np.testing.assert_array_equal(audio.load(tmp_path / "x", 1.0, float("inf")), whole[16000:])
    with pytest.raises(audio.EmptyAudioError, match=r"nothing after 2\.5 s: it ends at 2 s"):
        audio.load(tmp_path / "x", 2.5)


def test_a_part_of_another_rate(tmp_path):
    path = save(tmp_path / "x.wav", wav_bytes(sine(1000, 2, 48_000), 48_000, subtype="FLOAT"))
    part = audio.load(path, 0.5, 1.5, 8000)
    np.testing.assert_allclose(part[400:-400], sine(1000, 1, 8000)[400:-400], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"start": -1}, {"start": 2, "end": 1}, {"end": 0}, {"start": float("nan")}, {"end": float("nan")}]
    + [{"sampling_rate": 0}, {"block_seconds": 0}, {"block_seconds": float("inf")}, {"start": float("inf")}],
)
def test_senseless_requests(tmp_path, options):
    path = save(tmp_path / "x.wav", wav_bytes(np.zeros(1000)))
    with pytest.raises(UsageError):
        next(audio.blocks(path, **options))


def test_a_long_file_takes_no_memory(tmp_path):
    with soundfile.SoundFile(tmp_path / "x.flac", "w", 48_000, 2) as file:
        for _ in range(10):
            file.write(np.zeros((48_000 * 60, 2), np.int16))
    tracemalloc.start()
    try:
        total = sum(len(block) for block in audio.blocks(tmp_path / "x.flac", block_seconds=5))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 600 * RATE
    assert peak < 10e6  # the ten minutes are 230 MB as float32


# --- bad values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -32768.0])
@pytest.mark.parametrize("frame", [0, 12_345, 399_999])
def test_bad_values_are_named_with_their_place(tmp_path, value, frame):
    wave = np.zeros((400_000, 2), np.float32)
    wave[frame, 1] = value
    path = save(tmp_path / "x.wav", wav_bytes(wave, 8000, subtype="FLOAT"))
    place = rf"at {frame / 8000:g}\d* s \(sample {frame}, channel 2 of 2\)"
    with pytest.raises(audio.NonFiniteAudioError, match=place):
        audio.load(path)
    start = max(0.0, frame / 8000 - 1)
    with pytest.raises(audio.NonFiniteAudioError, match=place):
        audio.load(path, start=start)


def test_a_double_that_overflows_float32(tmp_path):
    with pytest.raises(audio.NonFiniteAudioError):
        audio.load(save(tmp_path / "x.wav", wav_bytes(np.full(10, 1e300), subtype="DOUBLE")))


# --- bad files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, error",
    [
        (b"", audio.EmptyAudioError),
        (wav_bytes(np.zeros(0)), audio.EmptyAudioError),
        (wav_bytes(np.zeros(10))[:44], audio.EmptyAudioError),  # the header only
        (wav_bytes(np.zeros(10))[:30], audio.UnreadableAudioError),  # half a header
        (b"RIFF", audio.UnreadableAudioError),
        (b"%PDF-1.7\n" * 99, audio.UnreadableAudioError),
        (b"\0" * 5000, audio.UnreadableAudioError),
    ],
)
def test_empty_and_other_files(tmp_path, data, error):
    path = save(tmp_path / "x.wav", data)
    for function in (audio.load, audio.duration):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(error, match=r"x\.wav"):
                function(path)


def test_one_sample(tmp_path):
    np.testing.assert_array_equal(audio.load(save(tmp_path / "x.wav", wav_bytes(np.array([0.5])))), [0.5])
    with pytest.raises(audio.EmptyAudioError, match="too short: 1 samples at 192000 Hz"):
        audio.load(save(tmp_path / "y.wav", wav_bytes(np.array([0.5]), 192_000)))


def test_missing_files(tmp_path):
    for name in ("nothing.wav", "x.wav/y.wav", "a\0b"):
        save(tmp_path / "x.wav", wav_bytes(np.zeros(10)))
        for function in (audio.load, audio.duration):
            with pytest.raises(UsageError, match="no such audio file"):
                function(str(tmp_path / name))


def test_what_is_not_a_regular_file(tmp_path):
    (tmp_path / "x.wav").mkdir()
    with pytest.raises(audio.UnreadableAudioError, match="is a directory"):
        audio.load(tmp_path / "x.wav")
    if sys.platform == "win32":
        return
    os.mkfifo(tmp_path / "fifo.wav")
    os.symlink("loop.wav", tmp_path / "loop.wav")
    for path in (tmp_path / "fifo.wav", "/dev/zero", "/dev/null"):
        with pytest.raises(audio.UnreadableAudioError, match="not a regular file"):
            audio.load(path)
    with pytest.raises(audio.UnreadableAudioError, match="cannot read"):
        audio.load(tmp_path / "loop.wav")


@pytest.mark.parametrize("size", [33_000, 0x7FFFFFFF, 0xFFFFFFFE])
def test_a_header_that_promises_too_much(tmp_path, size):
    wave = speechlike()
    data = wav_bytes(wave)
    data[40:44] = struct.pack("<I", size)
    with pytest.warns(audio.AudioWarning, match=f"{size} bytes promised, 32000 found"):
        read = audio.load(save(tmp_path / "x.wav", data))
    np.testing.assert_allclose(read, wave, atol=1e-4)


def test_garbage_after_the_data_is_not_read(tmp_path):
    wave = speechlike()
    read = audio.load(save(tmp_path / "x.wav", wav_bytes(wave) + b"\xff\x7f" * 500))
    assert len(read) == len(wave)


# Ogg is not here: the end of its stream is wherever it ends. FLAC loses up to a block of 4096, MP3 a few frames.
@pytest.mark.parametrize(
    "format, subtype, lost",
    [("WAV", "PCM_16", 0), ("AIFF", "PCM_16", 0), ("AU", "PCM_16", 0), ("FLAC", "PCM_16", 4096), ("MP3", None, 4096)],
)
def test_what_is_left_of_a_truncated_file_is_read(tmp_path, format, subtype, lost):
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 64_000)  # noise: every second takes as many bytes
    soundfile.write(tmp_path / "whole", wave, RATE, format=format, subtype=subtype)
    data = (tmp_path / "whole").read_bytes()
    with pytest.warns(audio.AudioWarning, match="truncated"):
        read = audio.load(save(tmp_path / "x", data[: len(data) * 3 // 4]))
    assert 48_000 - lost - 100 <= len(read) <= 48_000
    whole = audio.load(tmp_path / "whole")
    np.testing.assert_array_equal(read[:-1200], whole[: len(read) - 1200])  # MP3: the last frame needs its successor


def test_a_damaged_flac_is_read_up_to_the_damage(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 40_000)
    soundfile.write(tmp_path / "whole", wave, RATE, format="FLAC")
    data = bytearray((tmp_path / "whole").read_bytes())
    data[len(data) // 2] ^= 0xFF
    with pytest.warns(audio.AudioWarning, match="truncated or damaged"):
        read = audio.load(save(tmp_path / "x", data))
    assert len(read) >= 12_000
    np.testing.assert_allclose(read, wave[: len(read)], atol=1e-4)
    data[200] ^= 0xFF
    with pytest.raises(audio.UnreadableAudioError, match="nothing can be decoded"):
        audio.load(save(tmp_path / "y", data))


@pytest.mark.parametrize("frames", [0, 2**36 - 1])
def test_a_flac_stream_of_unknown_or_absurd_length(tmp_path, frames):
    wave = speechlike()
    soundfile.write(tmp_path / "x", wave, RATE, format="FLAC")
    data = bytearray((tmp_path / "x").read_bytes())
    data[21] = data[21] & 0xF0 | frames >> 32  # total samples: 36 bits of STREAMINFO, RFC 9639 section 8.2
    data[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    save(tmp_path / "x", data)
    if frames:
        with pytest.warns(audio.AudioWarning, match="truncated or damaged"):
            read = audio.load(tmp_path / "x")
    else:
        read = audio.load(tmp_path / "x")
        assert audio.duration(tmp_path / "x") == 1.0
    np.testing.assert_allclose(read, wave, atol=1e-4)


# --- joined recordings, wrong lengths ----------------------------------------------------------------------------------

JOINED = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("WAV", "PCM_16")]


@pytest.mark.parametrize("format, subtype", JOINED)
def test_recordings_joined_by_cat_are_read_whole(tmp_path, format, subtype):
    waves = speechlike(1.5), speechlike(0.7)[::-1], speechlike(1.1)
    parts = [bytes(wav_bytes(wave, format=format, subtype=subtype)) for wave in waves]
    alone = [audio.load(save(tmp_path / "part", part)) for part in parts]  # libsndfile's word for each
    assert [len(part) for part in alone] == [len(wave) for wave in waves]
    path = save(tmp_path / "joined", b"".join(parts))
    expected = np.concatenate(alone)
    np.testing.assert_array_equal(audio.load(path), expected)
    assert audio.duration(path) == len(expected) / RATE
    for start, end in ((1.25, 1.75), (1.6, 3.0), (2.5, None)):
        stop = None if end is None else round(end * RATE)
        np.testing.assert_allclose(audio.load(path, start, end), expected[round(start * RATE) : stop], atol=2e-3)
    with pytest.raises(audio.EmptyAudioError, match=r"it ends at 3\.3 s"):
        audio.load(path, 3.4)


def test_joined_recordings_of_other_rates_and_channels(tmp_path):
    stereo = np.stack([sine(500, 1, 48_000, 0.3)] * 2, axis=1)
    parts = (
        wav_bytes(sine(300, 1), format="FLAC"),
        wav_bytes(stereo, 48_000, format="FLAC"),
        wav_bytes(sine(200, 1), format="FLAC"),
    )
    read = audio.load(save(tmp_path / "x", b"".join(map(bytes, parts))))
    expected = np.concatenate([sine(300, 1), sine(500, 1, amplitude=0.3), sine(200, 1)])
    assert len(read) == len(expected)
    inner = np.abs((np.arange(len(read)) + RATE // 2) % RATE - RATE // 2) > 400  # the filter rings at the joints
    np.testing.assert_allclose(read[inner], expected[inner], atol=1e-3)


def varying(seconds):
    """Half silence, half noise: what a variable bitrate follows."""
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.random(round(seconds)) > 0.5, RATE)
    loud[:RATE] = False
    return loud * rng.uniform(-0.3, 0.3, len(loud))


def vbr_mp3(wave, rate=RATE):
    """An MP3 of variable bitrate without the frame in which LAME counts the others."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = buffer.getvalue()
    assert b"Xing" in data[:64]
    return data[data.index(b"\xff\xf3", 4) :]


def test_a_vbr_mp3_without_a_frame_count_is_read_whole(tmp_path):
    wave = varying(20)
    data = vbr_mp3(wave)
    path = save(tmp_path / "x.mp3", data)
    read = audio.load(path)
    # an encoder adds its delay and fills the last frame; decoders drop 529 samples
    assert len(wave) <= len(read) <= len(wave) + 3 * 576 and audio.duration(path) == len(read) / RATE
    power = np.square(read[576 : 576 + 20 * RATE]).reshape(20, RATE).mean(axis=1)
    np.testing.assert_array_equal(power > 1e-3, np.square(wave).reshape(20, RATE).mean(axis=1) > 1e-3)
    np.testing.assert_allclose(audio.load(path, 15.0, 16.0), read[15 * RATE : 16 * RATE], atol=2e-3)
    tagged = b"ID3\4\0\0\0\0\1\0" + bytes(128) + data + b"TAG" + bytes(125)
    np.testing.assert_array_equal(audio.load(save(tmp_path / "tagged.mp3", tagged)), read)
    twice = audio.load(save(tmp_path / "twice.mp3", tagged + tagged))
    np.testing.assert_array_equal(twice, np.concatenate([read, read]))


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg to compare with")
def test_the_length_of_a_vbr_mp3_is_ffmpegs(tmp_path):
    path = save(tmp_path / "x.mp3", vbr_mp3(varying(8)))
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "s16le", "-ac", "1", "-"]
    samples = len(subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE).stdout) // 2
    assert abs(len(audio.load(path)) - samples) <= 1152


def test_damage_within_an_mp3_is_passed_over_and_said(tmp_path):
    data = bytes(wav_bytes(varying(6), format="MP3"))
    half = len(data) // 2
    path = save(tmp_path / "x.mp3", data[:half] + b"\x11" * 5000 + data[half:])
    with audio.collected() as noticed:
        read = audio.load(path)
    assert all(isinstance(warning, audio.TruncatedAudioWarning) for warning in noticed)
    assert re.search(r"damaged: \d+ bytes in it are no MP3 frames", str(noticed[0]))
    assert 5.8 * RATE <= len(read) <= 6.2 * RATE
    with audio.collected() as noticed:
        audio.load(save(path, data + b"\x11" + data))
    assert str(noticed[0]).endswith("x.mp3 is damaged: a byte in it is no MP3 frame")


@pytest.mark.parametrize("format, subtype", [("CAF", "PCM_16"), ("AU", "PCM_16")])  # AIFF is refused
def test_what_follows_other_formats_is_not_left_out_in_silence(tmp_path, format, subtype):
    data = bytes(wav_bytes(speechlike(8), format=format, subtype=subtype))
    with pytest.warns(audio.TruncatedAudioWarning, match="bytes are not read"):
        assert len(audio.load(save(tmp_path / "x", data + data))) == 8 * RATE


def test_a_flac_that_counts_too_few_samples_is_not_taken_for_whole(tmp_path):
    data = wav_bytes(np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE), format="FLAC")
    data[21:26] = bytes([data[21] & 0xF0]) + struct.pack(">I", RATE)  # total samples, RFC 9639 section 8.2
    with pytest.warns(audio.TruncatedAudioWarning, match=r"x is damaged, or not one recording: \d+ of \d+ bytes"):
        assert len(audio.load(save(tmp_path / "x", data))) == RATE


def test_an_ogg_cut_within_a_page_and_a_part_that_cannot_be_read(tmp_path):
    data = bytes(wav_bytes(speechlike(20), format="OGG", subtype="VORBIS"))
    with pytest.warns(audio.TruncatedAudioWarning, match="its last page is not whole"):
        assert 0 < len(audio.load(save(tmp_path / "x", data[:-100]))) < 20 * RATE
    second = data[: data.index(b"OggS", 4)]  # its first page alone
    with audio.collected() as noticed:
        assert len(audio.load(save(tmp_path / "y", data + second + b"junk" + data))) == 40 * RATE
    assert any("recording 2 of 3 in it cannot be read" in str(warning) for warning in noticed)


def ogg_pages(data):
    """RFC 3533, section 6: 27 bytes, as many lengths as the last of them says, and as many bytes as these say."""
    while data:
        length = 27 + data[26] + sum(data[27 : 27 + data[26]])
        yield data[:length]
        data = data[length:]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_cut_between_two_pages_is_not_taken_for_whole(tmp_path, subtype):
    whole = bytes(wav_bytes(speechlike(20), format="OGG", subtype=subtype))
    cut = b"".join(list(ogg_pages(whole))[:-1])
    with pytest.warns(audio.TruncatedAudioWarning, match="x is truncated: its last page does not end the stream"):
        assert 0 < len(audio.load(save(tmp_path / "x", cut))) < 20 * RATE
    for data, said in ((cut + whole, 1), (whole + cut, 2)):
        with pytest.warns(audio.TruncatedAudioWarning, match=f"the last page of recording {said} in it does not end"):
            audio.load(save(tmp_path / "y", data))
    with audio.collected() as noticed:
        for data in (whole, whole + whole, whole + bytes(1000)):
            audio.load(save(tmp_path / "z", data))
    assert not noticed


def zero_sized(format, riff, size):
    data = wav_bytes(speechlike(), format=format)
    if format == "RF64":
        place = data.index(b"ds64") + 8
        data[place : place + 16] = struct.pack("<2Q", riff, size)
    elif format == "AU":
        data[8:12] = struct.pack(">I", size)
    elif format == "CAF":
        place = data.index(b"data") + 4
        data[place : place + 8] = struct.pack(">Q", size)
    elif format == "AIFF":
        place = data.index(b"SSND") + 4
        data[4:8], data[place : place + 4] = struct.pack(">I", riff), struct.pack(">I", size)
    else:
        place = data.index(b"data") + 4
        data[4:8], data[place : place + 4] = struct.pack("<I", riff), struct.pack("<I", size)
    return data


@pytest.mark.parametrize(
    "format, riff, size",
    [("WAV", riff, size) for riff in (0, 36, 32_036, 0xFFFFFFFF) for size in (0, 0xFFFFFFFF)]
    + [
        ("WAVEX", 0, 0),
        ("RF64", 0, 0),
        ("RF64", 2**64 - 1, 2**64 - 1),
        ("AU", 0, 0),
        ("AIFF", 0, 8),
        ("AIFF", 0, 0),
        ("CAF", 0, 0),
    ],
)
def test_samples_after_a_header_without_a_length_are_read(tmp_path, format, riff, size):
    path = save(tmp_path / "x", zero_sized(format, riff, size))
    with pytest.warns(audio.AudioWarning, match=r"x has no length in its header \(\w+ size \d+\)") as caught:
        read = audio.load(path)
    assert not any(isinstance(warning.message, audio.TruncatedAudioWarning) for warning in caught)  # all of it was read
    np.testing.assert_allclose(read, speechlike(), atol=1e-4)
    assert audio.duration(path) == 1.0


def test_a_wav_of_size_zero_with_half_a_sample_or_only_chunks(tmp_path):
    data = zero_sized("WAV", 0, 0)
    with pytest.warns(audio.AudioWarning, match="no length"):
        assert len(audio.load(save(tmp_path / "x", data + b"\x01"))) == RATE
    header = data[:44]
    for rest in (b"", b"LIST\x04\0\0\0INFO", b"LIST\x04\0\0\0INFOid3 \x03\0\0\0abc\0"):
        with pytest.raises(audio.EmptyAudioError):
            audio.load(save(tmp_path / "y", header + rest))


def test_warnings_are_collected_by_thread(tmp_path):
    whole, cut = wav_bytes(speechlike()), wav_bytes(speechlike())[:-2000]
    paths = [save(tmp_path / "whole.wav", whole), save(tmp_path / "cut.wav", cut)] * 8
    found = {}

    def work(number):
        with audio.collected() as noticed:
            audio.load(paths[number])
        found[number] = [type(warning) for warning in noticed]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(paths))] == [[], [audio.TruncatedAudioWarning]] * 8


# --- ffmpeg ------------------------------------------------------------------------------------------------------------

FFMPEG = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")


def encode(path, wave, rate, *options):
    """Let ffmpeg write a container."""
    source = save(path.with_name("source.wav"), wav_bytes(wave, rate))
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-i", source, *options, f"file:{path}"]
    subprocess.run(command, check=True)
    return path


@FFMPEG
@pytest.mark.parametrize(
    "name, options",
    [("x.m4a", ["-c:a", "alac"]), ("x.mkv", ["-c:a", "flac"]), ("x.wv", []), ("x.tta", []), ("x.mov", ["-c:a", "pcm_s16le"])],
)
def test_lossless_containers_give_the_same_samples(tmp_path, name, options):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * RATE + 123, 2))
    path = encode(tmp_path / name, wave, RATE, *options)
    read = audio.load(path)
    np.testing.assert_allclose(read, wave.mean(axis=1), atol=1e-4)
    assert audio.duration(path) == len(wave) / RATE
    np.testing.assert_array_equal(audio.load(path, 0.5, 1.25), read[8000:20000])
    np.testing.assert_array_equal(np.concatenate(list(audio.blocks(path, 1.0, block_seconds=0.3))), read[RATE:])
    with pytest.raises(audio.EmptyAudioError, match="nothing after 4 s"):
        audio.load(path, 4)


@FFMPEG
@pytest.mark.parametrize(
    "name, options",
    [("x.m4a", []), ("x.mp4", []), ("x.3gp", ["-c:a", "aac"]), ("x.webm", ["-c:a", "libopus"]), ("x.wma", []), ("x.aac", [])]
    + [("x.ac3", []), ("x.mkv", ["-c:a", "libvorbis"]), ("x.flv", ["-c:a", "aac"]), ("x.ts", ["-c:a", "aac", "-f", "mpegts"])],
)
def test_lossy_containers_are_decoded(tmp_path, name, options):
    wave = speechlike(2, 44_100 if name == "x.flv" else 48_000)
    rate = len(wave) // 2
    try:
        path = encode(tmp_path / name, wave, rate, *options)
    except subprocess.CalledProcessError:
        pytest.skip("this ffmpeg has no such encoder")
    read = audio.load(path.rename(tmp_path / "x"))  # the name does not matter
    assert 2 * RATE - 1024 <= len(read) <= 2 * RATE + 2048
    original = audio.resample(wave, rate)[4000:28_000]
    shifts = [read[4000 + shift : 28_000 + shift] for shift in range(-100, 1100)]
    assert max(float(part @ original) / np.linalg.norm(part) for part in shifts) > 0.98 * np.linalg.norm(original)


@FFMPEG
@pytest.mark.parametrize(
    "name", [b"-x.m4a", b"a:b.m4a", b"http:x.m4a", b"a b\n.m4a", b"\xff.m4a", b"%03d.m4a", b"x|y;$(z).m4a"]
)
def test_ffmpeg_takes_any_file_name(tmp_path, monkeypatch, name):
    encode(tmp_path / "x.m4a", speechlike(), RATE, "-c:a", "alac")
    monkeypatch.chdir(tmp_path)
    try:
        os.rename("x.m4a", name)
    except OSError:
        pytest.skip("this file system refuses the name")
    assert len(audio.load(name)) == RATE


@FFMPEG
def test_a_truncated_and_a_broken_container(tmp_path):
    data = encode(tmp_path / "x.mkv", np.random.default_rng(0).uniform(-1, 1, 4 * RATE), RATE, "-c:a", "flac").read_bytes()
    with pytest.warns(audio.TruncatedAudioWarning, match=r"y\.mkv is truncated or damaged: .* ffmpeg says"):
        assert 0 < len(audio.load(save(tmp_path / "y.mkv", data[: len(data) // 2]))) < 4 * RATE
    with pytest.raises(audio.UnreadableAudioError, match=r"cannot read .*z\.m4a \(M4A \(MPEG-4\)\): ffmpeg says"):
        audio.load(save(tmp_path / "z.m4a", b"\0\0\0\x18ftypM4A " + bytes(500)))
    with pytest.raises(audio.UnreadableAudioError):  # a playlist is not followed
        audio.load(save(tmp_path / "list.m4a", f"#EXTM3U\n{tmp_path / 'x.mkv'}\n".encode()))


HEADS = [
    (b"\0\0\0\x1cftypM4A \0\0\2\0", "M4A"),
    (b"\0\0\0\x1cftypisom\0\0\2\0", "MP4"),
    (b"\0\0\0\x1cftyp3gp4\0\0\2\0", "3GP"),
    (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm", "WebM"),
    (b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel", "WMA"),
    (b"#!AMR\n\x3c", "AMR"),
    (b"\xff\xf1\x60\x40", "AAC"),
    (b"caff\0\1\0\0desc" + bytes(7) + b"\x20" + struct.pack(">d", 44_100) + b"aac \0\0\0\0", "CAF with codec aac"),
]


@pytest.mark.parametrize("head, kind", HEADS)
def test_without_ffmpeg_the_container_and_the_command_are_named(tmp_path, monkeypatch, head, kind):
    monkeypatch.setenv("PATH", "")
    path = save(tmp_path / "a voice.x", head + bytes(100))
    for function in (audio.load, audio.duration):
        with pytest.raises(audio.UnreadableAudioError) as caught:
            function(path)
        message = str(caught.value)
        assert f"it is {kind}" in message and "\n" not in message
        assert f"ffmpeg -i '{path}' '{tmp_path / 'a voice.wav'}'" in message


AU = "import sys, time; out = sys.stdout.buffer; "
AU += "out.write(b'.snd' + bytes.fromhex('0000001c ffffffff 00000006 00003e80 00000001 00000000'))"


@pytest.mark.skipif(sys.platform == "win32", reason="the imitation is a script")
@pytest.mark.parametrize(
    "program, error",
    [
        ("import time; time.sleep(600)", "ffmpeg gave nothing more for 1 s and was ended"),
        (AU + "; out.flush(); time.sleep(600)", "ffmpeg gave nothing more for 1 s and was ended"),
        ("import os; os.system('sleep 600')", "ffmpeg gave nothing more for 1 s and was ended"),
        ("import os; os.kill(os.getpid(), 11)", "ffmpeg ended with code -11"),
        ("import sys; sys.exit('out of\\x1b[1m luck')", r"ffmpeg says: out of\\x1b\[1m luck$"),
        ("import sys; sys.stderr.write('x' * 10_000_000); sys.exit(1)", "ffmpeg says: x"),
        ("pass", "ffmpeg"),
        ("print('RIFF' * 100)", "ffmpeg"),
        (AU + "\nwhile True: out.write(bytes(2**20))", "ffmpeg makes more than .* far too much for its size"),
    ],
)
def test_an_ffmpeg_that_hangs_crashes_or_writes_without_end(tmp_path, monkeypatch, program, error):
    script = save(tmp_path / "ffmpeg", f"#!{sys.executable} -S\n{program}\n".encode())
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(audio, "_PATIENCE", 1.0)
    monkeypatch.setattr(audio, "_BOMB", (1000.0, 10.0))
    path = save(tmp_path / "x.m4a", HEADS[0][0])
    started = time.monotonic()
    with pytest.raises(audio.UnreadableAudioError, match=error):
        for _ in audio.blocks(path):
            pass
    assert time.monotonic() - started < 30


# --- any bytes ---------------------------------------------------------------------------------------------------------

_SEEDS = [wav_bytes(speechlike(0.05)), wav_bytes(speechlike(0.05), format="FLAC")]
_SEEDS += [wav_bytes(speechlike(0.05), format=f) for f in ("AIFF", "OGG", "CAF", "AU")]
_SEEDS += [wav_bytes(speechlike(0.05), format="WAV", subtype=s) for s in ("IMA_ADPCM", "FLOAT")]
_SEEDS += [2 * wav_bytes(speechlike(0.05), format=f) for f in ("WAV", "FLAC", "OGG", "MP3")]
_SEEDS += [zero_sized(f, 0, 0)[:3000] for f in ("WAV", "RF64", "AU", "CAF", "AIFF")]


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=300)
    | st.builds(
        lambda seed, changes, cut: _changed(_SEEDS[seed], changes, cut),
        st.integers(0, len(_SEEDS) - 1),
        st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=4)), max_size=4),
        st.integers(0, 3000),
    )
)
def test_no_bytes_crash(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.wav"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wave = audio.load(path, end=60)
        except audio.AudioError as error:
            assert "fuzz.wav" in str(error)
        else:
            assert wave.dtype == np.float32 and len(wave) and np.isfinite(wave).all()


@settings(max_examples=150, deadline=None)
@given(
    magic=st.sampled_from(
        [b"OggS\0\2", b"fLaC\0\0\0\x22", b"RIFF\0\0\0\0WAVE", b"FORM\0\0\0\0AIFF", b".snd", b"caff", b"RF64\0\0\0\0WAVE"]
    )
    | st.sampled_from([b"\xff\xfb\x90\0", b"\xff\xf3\x88\xc4", b"ID3\4\0\0\0\0\0\5", b""]),
    pieces=st.lists(
        st.binary(max_size=40)
        | st.sampled_from([b"OggS\0\2", b"data\0\0\0\0", b"\xff\xfb\x90\0" + bytes(413), b"SSND", b"TAG"])
    ),
    repeats=st.integers(1, 5),
)
def test_no_bytes_lead_a_view_out_of_its_file(tmp_path_factory, magic, pieces, repeats):
    path = save(tmp_path_factory.getbasetemp() / "layout.bin", (magic + b"".join(pieces)) * repeats)
    size = path.stat().st_size
    with open(path, "rb") as file:
        found = containers.layout(file)
        assert containers.foreign(file) is None or len(containers.foreign(file)) == 2
        for part in found.parts:
            for piece in part.pieces:
                assert isinstance(piece, bytes) or 0 <= piece[0] <= piece[1] <= size
            view = containers.View(file, part.pieces)
            length = view.seek(0, os.SEEK_END)
            assert view.seek(-length - 5, os.SEEK_CUR) == 0 and len(view.read()) == length and view.read(5) == b""


def _changed(data, changes, cut):
    data = bytearray(data)
    for place, value in changes:
        data[place : place + len(value)] = value
    return bytes(data[: len(data) - cut])


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forbids such names")
@pytest.mark.parametrize("name", [b"a b.wav", b"a\nb.wav", "😀.wav".encode(), b"\xff\xfe.wav", b"-x.wav", b"-", b"\"'\\"])
def test_any_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try:
        with open(name, "wb") as file:
            file.write(wav_bytes(np.full(100, 0.5)))
    except OSError:
        pytest.skip("this file system refuses the name")
    for path in (name, os.fsdecode(name), tmp_path / os.fsdecode(name)):
        np.testing.assert_array_equal(audio.load(path), np.full(100, 0.5, np.float32))
        assert audio.duration(path) == 100 / RATE
    with open(name, "wb"):
        pass
    with pytest.raises(audio.EmptyAudioError) as caught:
        audio.load(name)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_printable():
    assert audio.printable(b"a\xff\nb \xf0\x9f\x98\x80") == "a\\udcff\\nb 😀"
