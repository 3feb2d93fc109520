"""Generated speech for the quickstart and the tests: eSpeak NG out of the wheel ``espeakng-loader``, no system package.

The voices sound like a machine and the sentences are neutral: the corpus has many voices, rates and pitches to run the whole
chain on, but it does not represent human speech. The sentences were written for this package and have its licence.
"""

from __future__ import annotations

import csv
import ctypes
import json
import math
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from w2s_jax.audio import FULL_SCALE
from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.files import fingerprint, read_json, write_atomic

COLUMNS = ("file", "start", "end", "split", "speaker", "arousal", "dominance", "valence")

#: Increased when the same settings give another corpus.
VERSION = 1

#: Speakers per split, as eSpeak NG voice + variant. No variant is in two splits, so a held-out voice is a new one in
#: every language. Variants that whisper or run the Klatt synthesiser (whose noise cannot be seeded) are left out.
SPEAKERS = {
    "train": (
        "en-us+m1", "en-us+f1", "en+m7", "en+Annie", "de+m3", "de+f3", "de+linda", "fr+m5", "fr+f5", "fr+paul",
        "es+Alicia", "es+pablo", "es+m6", "it+steph", "it+Marco", "it+f4", "cs+Andrea", "cs+m8", "cs+Mike", "nl+john",
        "nl+belinda", "nl+ed",
    ),
    "validation": ("en-us+Andy", "de+anika", "it+quincy"),
    "test": ("en-us+m4", "en+f2", "fr+Jacky", "cs+grandma"),
}  # fmt: skip

SENTENCES = {
    "en": (
        "The bus to the museum leaves from the second stop.",
        "She put the blue cup next to the window.",
        "Our neighbour waters the tomatoes every other evening.",
        "The paper on the desk has three pages.",
        "A narrow path follows the river to the old mill.",
        "They open the library at nine and close it at six.",
        "Please leave the parcel with the man at the counter.",
        "The train was on time this morning.",
        "He carried two chairs from the kitchen into the garden.",
        "Most of the shops here sell bread and cheese.",
        "The meeting takes place in the room above the hall.",
        "We painted the fence and then we had some tea.",
    ),
    "de": (
        "Der Zug nach Norden hält heute an Gleis vier.",
        "Auf dem Tisch liegen ein Heft und zwei Stifte.",
        "Meine Schwester gießt am Abend die Blumen im Hof.",
        "Das Fenster im Flur geht auf den Garten hinaus.",
        "Wir treffen uns um drei vor dem Rathaus.",
        "Er stellt die Schüssel neben den Herd.",
        "Die Straße führt am See entlang bis zum Dorf.",
        "In der Bäckerei gibt es ab sieben frisches Brot.",
        "Das Buch steht im unteren Regal ganz links.",
        "Sie hat den Brief gestern zur Post gebracht.",
        "Am Montag wird der Aufzug im Haus gewartet.",
        "Nach dem Essen räumen wir gemeinsam die Küche auf.",
    ),
    "fr": (
        "Le bus numéro douze passe devant la mairie.",
        "Elle a posé les clés sur la petite table.",
        "Nous avons acheté du pain et des pommes au marché.",
        "La fenêtre de la chambre donne sur le jardin.",
        "Le facteur arrive chaque matin vers dix heures.",
        "Il range les livres dans le meuble du salon.",
        "Le chemin descend jusqu'au pont de pierre.",
        "Ma voisine arrose les fleurs après le dîner.",
        "La réunion commence à deux heures dans la grande salle.",
        "Les enfants ont dessiné une maison avec un toit rouge.",
        "On peut traverser la rivière près du moulin.",
        "Le magasin ferme plus tôt pendant l'été.",
    ),
    "es": (
        "El autobús de la playa sale cada media hora.",
        "Mi hermano dejó las llaves encima de la mesa.",
        "La biblioteca del barrio abre a las nueve.",
        "Compramos pan, queso y un kilo de naranjas.",
        "La ventana de la cocina da a un patio pequeño.",
        "El camino sigue el río hasta el pueblo.",
        "Ella escribe la lista en una hoja de papel.",
        "El vecino riega las plantas por la tarde.",
        "La reunión será el jueves en la segunda planta.",
        "Han pintado la puerta de color verde.",
        "El tren llegó a la estación a la hora prevista.",
        "Después de comer lavamos los platos y los vasos.",
    ),
    "it": (
        "Il treno per il mare parte dal secondo binario.",
        "Ho lasciato il quaderno sulla sedia vicino alla porta.",
        "La signora del piano di sopra innaffia i fiori.",
        "Al mercato abbiamo comprato pane, olive e mele.",
        "La strada passa accanto al lago e poi sale.",
        "Il negozio all'angolo apre alle otto e mezza.",
        "Lui mette i bicchieri nella credenza della cucina.",
        "La finestra dello studio guarda sul cortile.",
        "La riunione di domani si tiene nella sala grande.",
        "I bambini hanno disegnato una barca e due case.",
        "Dopo pranzo facciamo una passeggiata fino al ponte.",
        "La lettera è arrivata ieri con la posta.",
    ),
    "cs": (
        "Vlak do města odjíždí z druhého nástupiště.",
        "Na stole leží sešit a dvě tužky.",
        "Sousedka každý večer zalévá květiny na balkoně.",
        "Okno v kuchyni vede do malé zahrady.",
        "Cesta se u mlýna stáčí dolů k řece.",
        "Knihovna má dnes otevřeno do šesti hodin.",
        "Koupili jsme chleba, sýr a kilo jablek.",
        "Schůzka začíná ve dvě hodiny ve velkém sále.",
        "Bratr postavil židli vedle skříně.",
        "Dopis přišel včera ranní poštou.",
        "Děti nakreslily dům s červenou střechou.",
        "Po obědě umyjeme nádobí a uklidíme stůl.",
    ),
    "nl": (
        "De trein naar het zuiden vertrekt van spoor vijf.",
        "Op de tafel liggen een boek en twee potloden.",
        "De buurman geeft de planten elke avond water.",
        "Het raam van de keuken kijkt uit op de tuin.",
        "Wij kopen brood en kaas op de markt.",
        "De weg loopt langs het kanaal naar het dorp.",
        "Zij heeft de brief gisteren op de post gedaan.",
        "De winkel op de hoek gaat om negen uur open.",
        "Hij zet de stoelen weer naast het bureau.",
        "De vergadering is donderdag in de grote zaal.",
        "Na het eten ruimen we samen de keuken op.",
        "De kinderen tekenen een huis met een rood dak.",
    ),
}

# espeak_PARAMETER and the other constants of speak_lib.h
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8 = 2, 0x8000, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_lock = threading.Lock()  # eSpeak NG is not thread-safe


class _Espeak:
    """One eSpeak NG, loaded from a private copy of the library.

    The library keeps its state in globals (voice, parameters, phase of the wave, noise), and initialising it again does not
    reset all of them. A fresh copy of the file is a fresh set of globals: two instances that get the same calls give the
    same samples.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise missing_extra("espeakng-loader", "quickstart") from error
        source, data = Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
        # the copy can be deleted as soon as it is loaded, except on Windows, where it stays until the next clean-up
        with tempfile.TemporaryDirectory(prefix="w2s-espeak-", ignore_cleanup_errors=True) as directory:
            try:
                self._library = ctypes.CDLL(shutil.copy(source, directory))
            except OSError:  # files in a temporary directory may not be executable; without the copy the state is shared
                try:
                    self._library = ctypes.CDLL(str(source))
                except OSError as error:
                    raise W2SError(f"cannot load eSpeak NG from {source}: {error}") from error
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
            ctypes.c_void_p,
        ]  # fmt: skip
        self.sampling_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _DO_NOT_EXIT)
        if self.sampling_rate <= 0:
            raise W2SError(f"eSpeak NG cannot read its data in {data} (its path may have at most about 150 characters)")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._variants = {path.name for path in (data / "voices" / "!v").iterdir()}
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # referenced here: the library has only the address

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def synthesise(self, text: str, voice: str, rate: int, pitch: int, range: int) -> np.ndarray:
        """int16 [T]; voice and parameters are set on every call, because the library remembers the last ones."""
        for name, value, low, high in (("rate", rate, 80, 450), ("pitch", pitch, 0, 99), ("range", range, 0, 99)):
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; eSpeak NG takes {low} to {high}")
        with _lock:
            # checked here, as the library ignores an unknown variant
            variant = voice.partition("+")[2]
            if ("+" in voice and variant not in self._variants) or self._library.espeak_SetVoiceByName(voice.encode()):
                raise UsageError(f"unknown voice {voice!r}; expected a language of eSpeak NG, or one with a variant: en-us+m3")
            for parameter, value in ((_RATE, rate), (_VOLUME, 100), (_PITCH, pitch), (_RANGE, range)):
                self._library.espeak_SetParameter(parameter, int(value), 0)
            self._library.espeak_SetSynthCallback(self._callback)
            data = text.encode() + b"\0"
            self._chunks.clear()
            if self._library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None):
                raise W2SError(f"eSpeak NG failed on {text!r} with the voice {voice}")
            return np.concatenate([np.zeros(0, np.int16), *self._chunks])


_shared: _Espeak | None = None


def synthesise(text: str, voice: str = "en-us", rate: int = 175, pitch: int = 50, range: int = 50) -> tuple[np.ndarray, int]:
    """Synthesise a text. Threads may call it; they take turns.

    Repeating a call gives the same speech but not the same samples: the library carries its phase and noise on.

    Args:
        text: what is spoken.
        voice: a language or voice of eSpeak NG, with a variant or without: ``de``, ``en-us+f2``.
        rate: words per minute, 80 to 450.
        pitch: base pitch, 0 to 99; 50 is the voice's own.
        range: liveliness of the intonation, 0 (flat) to 99; 50 is the voice's own.

    Returns:
        float32 samples [T] in -1..1, and the sampling rate in Hz (22050).

    Raises:
        UsageError: no such voice, a parameter out of range, or espeakng-loader is not installed.
        W2SError: the library cannot be loaded, or failed.

    Example:
        >>> wave, sampling_rate = synthesise("Good morning.", voice="en-us+f2")
    """
    global _shared
    with _lock:
        if _shared is None:
            _shared = _Espeak()
    wave = _shared.synthesise(text, voice, rate, pitch, range)
    return wave.astype(np.float32) / FULL_SCALE, _shared.sampling_rate


def make_corpus(
    directory: str | Path, seed: int = 0, clips: int = 600, progress: Callable[[int, int], object] | None = None
) -> Path:
    """Write a corpus of generated speech: mono 16-bit WAV files and a ``corpus.csv`` that lists them.

    The columns are ``COLUMNS``; start, end and the labels are empty (whole files, a teacher labels them). The speakers take
    turns; each clip has random sentences, rate (110 to 260 words per minute), pitch (20 to 80) and range (10 to 90), and lasts
    about 2.5 to 5 seconds. The splits share no speaker. The same settings give the same bytes.

    Args:
        directory: where to; it is written under a temporary name, then renamed. A corpus of the same settings stays as it
            is, one of other settings is replaced.
        seed: another seed gives other sentences, rates and pitches with the same speakers.
        clips: how many clips in all splits together.
        progress: called as ``progress(done, total)`` after each clip.

    Returns:
        The path of ``corpus.csv``.

    Raises:
        UsageError: ``directory`` holds something else, ``clips`` is too small, or espeakng-loader is not installed.
        W2SError: the library failed, or the directory cannot be written.
    """
    directory = Path(directory)
    speakers = [(split, speaker) for split, names in SPEAKERS.items() for speaker in names]
    if clips < len(speakers):
        raise UsageError(f"clips is {clips}; expected at least one for each of the {len(speakers)} speakers")
    settings = {
        "made_by": "w2s_jax.speech with eSpeak NG",
        "version": VERSION,
        "seed": seed,
        "clips": clips,
        "speech": fingerprint(SPEAKERS, SENTENCES),
    }
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if not (directory / "corpus.json").exists():
            raise UsageError(f"{directory} is not empty and no generated corpus; choose another directory")
        if read_json(directory / "corpus.json", "generated corpus") == settings and (directory / "corpus.csv").exists():
            return directory / "corpus.csv"
    espeak = _Espeak()

    def write(temporary: Path) -> None:
        rows = []
        for clip in range(clips):
            split, speaker = speakers[clip % len(speakers)]
            file = Path("audio", speaker, f"{clip // len(speakers):03d}.wav")
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            wave = _speak_clip(espeak, speaker, np.random.default_rng([seed, clip]))
            soundfile.write(temporary / file, wave, espeak.sampling_rate, subtype="PCM_16")
            rows.append((file.as_posix(), "", "", split, speaker, "", "", ""))
            if progress:
                progress(clip + 1, clips)
        with open(temporary / "corpus.csv", "w", newline="", encoding="utf-8") as csv_file:
            csv.writer(csv_file).writerows([COLUMNS, *rows])
        (temporary / "corpus.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    write_atomic(directory, write)
    return directory / "corpus.csv"


def _speak_clip(espeak: _Espeak, speaker: str, random: np.random.Generator) -> np.ndarray:
    """Synthesise random sentences: int16 [T], at most 5 s, without the silence at both ends."""
    rate = round(math.exp(random.uniform(math.log(110), math.log(260))))
    pitch, range_ = int(random.integers(20, 81)), int(random.integers(10, 91))
    sentences = random.permutation(SENTENCES[speaker.partition("+")[0].partition("-")[0]])
    letters, count = 0, 0
    while letters < 3.4 * rate / 60 * 6:  # enough for about 3.4 s, at six letters (with the space) a word
        letters, count = letters + len(sentences[count]), count + 1
    wave = espeak.synthesise(" ".join(sentences[:count]), speaker, rate, pitch, range_)
    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > 100)
    return wave[loud[0] : loud[-1] + 1][: 5 * espeak.sampling_rate] if loud.size else wave
