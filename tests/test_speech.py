"""Generated speech. Pitch is judged by librosa's YIN, voices by their waveforms."""

import csv
import sys
import threading

import librosa
import numpy as np
import pytest
import soundfile

from w2s_jax import speech
from w2s_jax.errors import UsageError

pytest.importorskip("espeakng_loader")
TEXT = "The train was on time this morning."


def median_pitch(wave, sampling_rate):
    f0 = librosa.yin(wave, fmin=60, fmax=500, sr=sampling_rate, frame_length=1024)
    rms = librosa.feature.rms(y=wave, frame_length=1024, hop_length=256)[0]
    n = min(len(f0), len(rms))
    return np.median(f0[:n][rms[:n] > 0.2 * rms.max()])


def test_speech_is_audible():
    wave, sampling_rate = speech.synthesise(TEXT)
    assert wave.dtype == np.float32 and wave.ndim == 1 and sampling_rate == 22050
    assert 1 < len(wave) / sampling_rate < 5
    assert 0.02 < np.sqrt(np.mean(wave**2)) < 0.5 and np.abs(wave).max() <= 1


@pytest.mark.parametrize("voice", ["en-us", "de+f3"])
def test_the_pitch_parameter_raises_the_pitch(voice):
    low, middle, high = (median_pitch(*speech.synthesise(TEXT, voice, pitch=pitch)) for pitch in (20, 50, 80))
    assert low < 0.9 * middle < 0.81 * high


def test_the_rate_shortens_and_the_range_spreads():
    slow, fast = (len(speech.synthesise(TEXT, rate=rate)[0]) for rate in (110, 260))
    assert slow > 1.8 * fast
    assert len(speech.synthesise("")[0]) < 2205


def test_voices_differ():
    wave, other = speech.synthesise(TEXT, "en-us+m3"), speech.synthesise(TEXT, "en-us+f2")
    assert median_pitch(*other) > 1.3 * median_pitch(*wave)


def test_a_call_does_not_colour_the_next():
    before = speech.synthesise(TEXT)
    speech.synthesise(TEXT, "en-us+f3", rate=250, pitch=90, range=90)
    after = speech.synthesise(TEXT)
    assert median_pitch(*after) == pytest.approx(median_pitch(*before), rel=0.02)
    assert len(after[0]) == pytest.approx(len(before[0]), rel=0.01)


def test_threads_take_turns():
    lengths = {}
    texts = ["One.", "One and two and three.", TEXT, TEXT + " " + TEXT]

    def speak(i):
        lengths[i] = len(speech.synthesise(texts[i % 4])[0])

    threads = [threading.Thread(target=speak, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(16):
        assert lengths[i] == pytest.approx(lengths[i % 4], rel=0.02)


@pytest.mark.parametrize("voice", ["nosuch", "en-us+nosuch", "en-us+", "", "+m3", "en-us+../../lang/gmw/en"])
def test_an_unknown_voice_is_an_error(voice):
    with pytest.raises(UsageError, match="unknown voice"):
        speech.synthesise(TEXT, voice)


@pytest.mark.parametrize("parameter", [{"rate": 20}, {"pitch": 120}, {"range": -1}])
def test_a_parameter_out_of_range_is_an_error(parameter):
    with pytest.raises(UsageError, match=next(iter(parameter))):
        speech.synthesise(TEXT, **parameter)


def test_without_the_wheel_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(speech, "_shared", None)
    with pytest.raises(UsageError, match=r"\[quickstart\]"):
        speech.synthesise(TEXT)


def test_every_sentence_can_be_spoken_in_every_language_used():
    languages = {speaker.partition("+")[0].partition("-")[0] for names in speech.SPEAKERS.values() for speaker in names}
    assert languages == set(speech.SENTENCES)
    assert all(len(set(sentences)) == len(sentences) >= 12 for sentences in speech.SENTENCES.values())


def test_no_variant_is_in_two_splits():
    variants = [speaker.partition("+")[2] for names in speech.SPEAKERS.values() for speaker in names]
    assert len(set(variants)) == len(variants)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    calls = []
    directory = tmp_path_factory.mktemp("speech") / "corpus"
    path = speech.make_corpus(directory, clips=60, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 60) for i in range(1, 61)]
    return path


def test_corpus_table(corpus):
    assert corpus.name == "corpus.csv"
    with open(corpus, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == "file,start,end,split,speaker,arousal,dominance,valence"
    assert len(rows) == 60 == len({row["file"] for row in rows})
    assert all(row[name] == "" for row in rows for name in ("start", "end", "arousal", "dominance", "valence"))
    speakers = {split: {row["speaker"] for row in rows if row["split"] == split} for split in ("train", "validation", "test")}
    assert {split: len(names) for split, names in speakers.items()} == {k: len(v) for k, v in speech.SPEAKERS.items()}
    assert not speakers["train"] & speakers["test"] and not speakers["train"] & speakers["validation"]
    for row in rows:
        info = soundfile.info(corpus.parent / row["file"])
        assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
        assert 2.0 <= info.duration <= 5.0


def contents(corpus):
    return {path.relative_to(corpus.parent): path.read_bytes() for path in corpus.parent.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    speech.synthesise(TEXT, "fr+f5")  # what was spoken before must not matter
    again = speech.make_corpus(tmp_path / "again", clips=60)
    assert contents(again) == contents(corpus)
    assert contents(speech.make_corpus(tmp_path / "other", clips=60, seed=1)) != contents(corpus)


def test_a_corpus_of_the_same_settings_is_kept_and_another_replaced(tmp_path):
    calls = []
    corpus = speech.make_corpus(tmp_path / "corpus", clips=30)
    before = corpus.stat().st_mtime_ns
    assert speech.make_corpus(tmp_path / "corpus", clips=30, progress=lambda *call: calls.append(call)) == corpus
    assert corpus.stat().st_mtime_ns == before and not calls
    speech.make_corpus(tmp_path / "corpus", clips=31)
    assert len(corpus.read_text().splitlines()) == 32


def test_a_directory_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        speech.make_corpus(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="clips"):
        speech.make_corpus(tmp_path / "new", clips=3)
