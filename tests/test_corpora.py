import csv
import dataclasses
import os
import sys
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile
from conftest import voice
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import bank, files
from w2s_jax.corpora import (
    CORPORA,
    Clip,
    CorpusError,
    CorpusWarning,
    assign_splits,
    check_decoded,
    check_splits,
    drop_leaks,
    find_leaks,
    read,
)
from w2s_jax.errors import UsageError, W2SError

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="links and any bytes in names")


@pytest.fixture(autouse=True)
def strict():
    """A warning is an error unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def touch(root, *names):
    """Adapters never decode, so the audio is a few bytes, but others in each file: equal files are one recording."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return root


def names(clips):
    return [clip.name for clip in clips]


# --- read --------------------------------------------------------------------------------------------------------------


def test_unknown_corpus_option_and_source(tmp_path):
    with pytest.raises(UsageError, match="unknown corpus 'ravdess'; known: folder, csv, msp-podcast, iemocap"):
        read("ravdess", tmp_path)
    with pytest.raises(UsageError, match="folder has no option colour, size; it has split_by"):
        read("folder", tmp_path, size=1, colour=2)
    with pytest.raises(UsageError, match="csv has no option colour; it has none"):
        read("csv", tmp_path, colour=2)
    for corpus in CORPORA:
        with pytest.raises(UsageError, match="nothing"):
            read(corpus, tmp_path / "nothing")
    with pytest.raises(UsageError, match="is not a directory; expected a directory of audio files"):
        read("folder", touch(tmp_path, "x.wav") / "x.wav")
    with pytest.raises(UsageError, match="cannot read"):
        read("csv", tmp_path)


# --- folder ------------------------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    touch(tmp_path, "b/2.FLAC", "b/1.wav", "a/x y/3.Mp3", "top.opus", "readme.txt", ".hidden.wav", ".git/x.wav", "no")
    with pytest.warns(CorpusWarning, match=r"2 other files ignored: \.txt 1, no extension 1$"):
        clips = read("folder", tmp_path)
    assert names(clips) == ["a/x y/3.Mp3", "b/1.wav", "b/2.FLAC", "top.opus"]
    assert clips[1] == Clip(file=str(tmp_path / "b" / "1.wav"), name="b/1.wav")
    assert all(os.path.isfile(clip.file) for clip in clips)
    with pytest.warns(CorpusWarning):
        assert [clip.group for clip in read("folder", str(tmp_path), split_by="folder")] == ["a", "b", "b", None]
    with pytest.raises(UsageError, match="split_by must be one of none, folder, got 'speaker'"):
        read("folder", tmp_path, split_by="speaker")


def test_folder_without_audio(tmp_path):
    with pytest.raises(CorpusError, match=r"no audio in .*: 2 other files found, expected names that end in \.wav"):
        read("folder", touch(tmp_path, "x.txt", "a/y.png"))


def test_a_folder_lists_the_audio_that_needs_ffmpeg_and_counts_what_it_leaves_out(tmp_path):
    audio = ["1.wav", "2.m4a", "3.WEBM", "4.wma", "5.amr", "6.caf", "7.3gp", "8.mp4", "9.mkv", "a.aac", "b.opus", "c.vox"]
    touch(tmp_path, *audio, *(f"{n}.txt" for n in range(10)), "x.json", "sub/y.JSON", *(f"z.{kind}" for kind in "abcdefgh"))
    with pytest.warns(CorpusWarning) as caught:
        assert names(read("folder", tmp_path)) == audio
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path}: 20 other files ignored: .txt 10, .json 2, .a 1, .b 1, .c 1, .d 1, .e 1, .f 1, 2 other kinds"
    ]


def test_audio_that_cannot_be_decoded_is_in_failures_csv(tmp_path):
    touch(tmp_path, "broken.m4a", "headerless.vox")
    soundfile.write(tmp_path / "good.wav", 0.1 * np.sin(np.arange(16_000)), 16_000)
    clips = [dataclasses.replace(clip, split="train") for clip in read("folder", tmp_path)]
    bank.build(clips, tmp_path / "bank")
    with open(tmp_path / "bank" / "failures.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["broken.m4a", "headerless.vox"]


@POSIX
def test_folder_with_links(tmp_path):
    root = touch(tmp_path / "root", "a/1.wav", "b/2.wav")
    touch(tmp_path / "elsewhere", "3.wav")
    touch(tmp_path, "neighbour.wav")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "back").symlink_to("../b")
    (root / "b" / "back").symlink_to("../a")
    (root / "up").symlink_to("..")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    clips = read("folder", root)
    assert names(clips) == ["a/1.wav", "b/2.wav", "out/3.wav"]
    (root / "broken.wav").symlink_to("nowhere")
    with pytest.raises(CorpusError, match=r"1 x missing file \(broken\.wav: "):
        read("folder", root)


@POSIX
def test_folder_with_any_names(tmp_path):
    raw = [b"-x.wav", b"a b.wav", b"a\nb.wav", "😀.wav".encode(), b"\xff.wav"]
    try:
        for name in raw:
            touch(tmp_path, os.fsdecode(name))
    except OSError:
        pytest.skip("this file system refuses the names")
    clips = read("folder", tmp_path)
    assert {os.fsencode(os.path.basename(clip.file)) for clip in clips} == set(raw)
    for clip in clips:
        clip.name.encode()
        assert "\n" not in clip.name


# --- csv ---------------------------------------------------------------------------------------------------------------


def table(tmp_path, text, *audio):
    touch(tmp_path, *audio)
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_by_hand(tmp_path):
    source = table(
        tmp_path,
        "valence,file,end,start,arousal,split,dominance,speaker\n"  # any order
        "0.1,a.wav,2.5,1,0.9,Train,0.5,Ann\n"
        "\n"
        '1,"sub/b, c.wav",,,0,dev,,\n'
        "0.25,a.wav,0 days 00:01:03.250000,0 days 00:01:02.500000000,1e-1,training,.75,Ann\n",
        "a.wav",
        "sub/b, c.wav",
    )
    first, second, third = read("csv", source)
    assert first == Clip(
        file=str(tmp_path / "a.wav"),
        name="a.wav",
        start=1.0,
        end=2.5,
        split="train",
        speaker="Ann",
        arousal=0.9,
        dominance=0.5,
        valence=0.1,
    )
    assert second == Clip(
        file=str(tmp_path / "sub" / "b, c.wav"), name="sub/b, c.wav", split="validation", arousal=0.0, valence=1.0
    )
    assert (third.start, third.end, third.arousal, third.dominance, third.valence) == (62.5, 63.25, 0.1, 0.75, 0.25)


@pytest.mark.parametrize(
    "text",
    [
        "file,arousal\na.wav,0.5\n",
        "\ufefffile,arousal\na.wav,0.5\n",  # a BOM, as Excel writes
        "file,arousal\r\na.wav,0.5\r\n",
        "\ufefffile,arousal\r\n\r\na.wav,0.5",
        '"file","arousal"\n"a.wav","0.5"\n',
        " file , arousal \na.wav, 0.5 \n\n,\n",
    ],
)
def test_csv_dialects(tmp_path, text):
    (clip,) = read("csv", table(tmp_path, text, "a.wav"))
    assert (clip.name, clip.arousal, clip.split, clip.end) == ("a.wav", 0.5, None, None)


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1.5", 1.5),
        ("0 days 00:00:01.500", 1.5),
        ("0 days 00:00:01.500000", 1.5),
        ("00:01:01", 61),
        ("1 days 01:00:00.25", 90_000.25),
        ("1 day, 1:00:00", 90_000),
        ("NaT", None),
        ("", None),
    ],
)
def test_csv_times(tmp_path, text, seconds):
    (clip,) = read("csv", table(tmp_path, f'file,end\na.wav,"{text}"\n', "a.wav"))
    assert clip.end == seconds


def test_csv_times_of_audformat(tmp_path):
    pandas = pytest.importorskip("pandas")
    times = pandas.to_timedelta([0.0, 1.23456789, 3661.5, 100_000], unit="s")
    rows = [f"a.wav,{t},{t + pandas.Timedelta(seconds=1)}" for t in times]
    clips = read("csv", table(tmp_path, "\n".join(["file,start,end", *rows]), "a.wav"))
    assert [clip.start for clip in clips] == pytest.approx(list(times.total_seconds()), abs=1e-9)


#: What audformat 1.4.3 with pandas 3.1.1 wrote: db.save(root, storage_format="csv"), then DataFrame.to_csv of tables with
#: audformat.segmented_index, whose times are "0 days" where a whole column is of whole days, and NaT or blank for "to the end".
AUDFORMAT = {
    "db.segments.csv": (
        "file,start,end,arousal,emotion,speaker\n"
        "a.wav,0 days 00:00:00.000000,0 days 00:00:01.500000,0.1,joy,s1\n"
        "a.wav,0 days 00:00:01.500000,0 days 00:00:03.250000,0.5,anger,s1\n"
        "b.wav,0 days 00:00:00.000000,,0.9,joy,s2\n",
        [(0, 1.5), (1.5, 3.25), (0, None)],
    ),
    "db.files.csv": ("file,arousal\nc.wav,0.3\n", [(0, None)]),
    "whole seconds": (
        "file,start,end\n"
        "a.wav,0 days 00:00:00,0 days 00:00:01.000000000\n"
        "a.wav,0 days 00:00:01,0 days 00:01:00.000000000\n"
        "a.wav,0 days 00:01:00,0 days 01:00:00.500000000\n"
        "a.wav,1 days 00:00:00,1 days 01:00:00.123456789\n",
        [(0, 1), (1, 60), (60, 3600.5), (86_400, 90_000.123456789)],
    ),
    "from the beginning": (
        "file,start,end,x\na.wav,0 days,0 days 00:00:01,1\nb.wav,0 days,0 days 00:00:02,2\n",
        [(0, 1), (0, 2)],
    ),
    "whole files": ("file,start,end,x\na.wav,0 days,,1\nb.wav,0 days,,2\n", [(0, None), (0, None)]),
    "na_rep": ("file,start,end,x\na.wav,0 days,NaT,1\nb.wav,0 days,NaT,2\n", [(0, None), (0, None)]),
}


@pytest.mark.parametrize("name", AUDFORMAT)
def test_tables_of_audformat_are_read(tmp_path, name):
    text, expected = AUDFORMAT[name]
    warnings.simplefilter("ignore")  # emotion, x: unknown columns
    clips = read("csv", table(tmp_path, text, "a.wav", "b.wav", "c.wav"))
    assert [(clip.start, clip.end) for clip in clips] == expected


def test_a_table_in_parquet_is_named(tmp_path):
    with pytest.raises(CorpusError, match="is parquet; expected CSV"):
        read("csv", table(tmp_path, b"PAR1\x15\x04\x15", "a.wav"))


@pytest.mark.parametrize(
    "text", ["1e400", "1e300", "9" * 400, "9" * 5000 + " days", "1e5 days", "-1 days +23:59:59", "inf", "nan"]
)
def test_times_that_overflow_are_named_with_their_line(tmp_path, text):
    with pytest.raises(CorpusError, match=r"1 x not a time \(line 3: end ") as caught:
        read("csv", table(tmp_path, f"file,end\na.wav,1\na.wav,{text}\n", "a.wav"))
    assert len(str(caught.value)) < 400


def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs here")
    for name in ("x.csv", "labels.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=r"x\.csv: it is no regular file, but a pipe or a device; expected a CSV file"):
        read("csv", tmp_path / "x.csv")
    with pytest.raises(UsageError, match=r"/dev/zero: it is no regular file"):
        read("csv", "/dev/zero")
    with pytest.raises(UsageError, match=r"labels\.json: it is no regular file"):
        files.read_json(tmp_path / "labels.json", "labels")
    iemocap(tmp_path, sessions=[1])
    os.mkfifo(tmp_path / "Session1/dialog/EmoEvaluation/z.txt")
    with pytest.raises(UsageError, match=r"z\.txt: it is no regular file"):
        read("iemocap", tmp_path)


def test_text_has_a_bound(tmp_path):
    for name in ("x.csv", "labels.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**40)  # a hole: it takes no place on the disk
    with pytest.raises(UsageError, match=r"x\.csv is too large: 1,099,511,627,776 bytes; expected a CSV file of at most"):
        read("csv", tmp_path / "x.csv")
    with pytest.raises(UsageError, match=r"labels\.json is too large"):
        files.read_json(tmp_path / "labels.json", "labels")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for name, message in (("deep", "not JSON"), ("latin", "not UTF-8")):
        with pytest.raises(W2SError, match=f"{name}.json is damaged: {message}"):
            files.read_json(tmp_path / f"{name}.json", "labels")
    with pytest.raises(UsageError, match="it is a directory"):
        files.read_text(tmp_path, "a table")


def test_csv_unknown_columns_warn(tmp_path):
    source = table(tmp_path, "file,emotion,Arousal\na.wav,joy,0.5\n", "a.wav")
    with pytest.warns(CorpusWarning, match="unknown columns left out: emotion, Arousal"):
        (clip,) = read("csv", source)
    assert clip.arousal is None


def test_csv_reports_everything_at_once(tmp_path):
    source = table(
        tmp_path,
        "file,start,end,split,arousal\n"
        "a.wav,0,1,train,1.5\n"  # 2
        "a.wav,1,2,train,-0.1\n"
        "a.wav,2,3,train,nan\n"  # 4
        "a.wav,3,2,train,0.5\n"
        "b.wav,0,1,train,0.5\n"  # 6
        "a.wav,5,6,holdout,0.5\n"
        "a.wav,6,7,train,0.5\n"  # 8
        "a.wav,6.0,7.0,test,0.6\n"
        "a.wav,x,9,train,0.5\n"  # 10
        "a.wav,-1,9,train,0.5\n"
        ",1,2,train,0.5\n"  # 12
        "a.wav,1\n"
        'a.wav,10,11,train,"0,5"\n'  # 14
        "a.wav,inf,,train,1_0\n"
        "a.wav,1e999,,train,2\n"  # 16
        "a.wav,12,13,train,3\n"
        "a.wav,13,14,train,4\n",
        "a.wav",
    )
    with pytest.raises(CorpusError) as caught:
        read("csv", source)
    message = str(caught.value)
    for expected in (
        "labels.csv has errors",
        "4 x value outside 0..1 (line 2: arousal 1.5; line 3: arousal -0.1; line 17: arousal 3; …)",
        "3 x not a number (line 4: arousal nan; line 14: arousal 0,5; line 15: arousal 1_0)",
        "3 x not a time (line 10: start x; line 15: start inf; line 16: start 1e999)",
        "1 x end <= start (line 5: 3 to 2)",
        "1 x missing file (line 6: ",
        "1 x unknown split (expected train, validation, test) (line 7: holdout)",
        "1 x duplicate (line 9: as line 8)",
        "1 x start < 0 (line 11: -1)",
        "1 x no file (line 12)",
        "1 x not 5 cells as in the first line (line 13: 2 cells)",
    ):
        assert expected in message
    assert "\n" not in message


def test_csv_line_numbers_after_a_quoted_newline(tmp_path):
    source = table(tmp_path, 'file,speaker,arousal\na.wav,"x\ny",0.5\na.wav,z,7\n', "a.wav")
    with pytest.raises(CorpusError, match=r"line 4: arousal 7"):
        read("csv", source)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no column file in its first line; found: nothing"),
        ("path,arousal\na.wav,0.5\n", "no column file in its first line; found: path, arousal"),
        ("file;arousal\na.wav;0.5\n", "found: file;arousal. Expected UTF-8 text separated by commas"),
        ("file,arousal,arousal\na.wav,0.5,0.6\n", "has a column twice: arousal"),
        ("file,arousal\n", "has no clips"),
        ('file,arousal\n"a.wav,0.5\n', "is not CSV: line 2"),
        ("file,arousal\na.wav,0.5\n".encode("utf-16"), "no column file"),
        ("file\na\0.wav\n", "missing file|not CSV"),
    ],
)
def test_csv_that_is_none(tmp_path, text, message):
    with pytest.raises(CorpusError, match=message):
        read("csv", table(tmp_path, text, "a.wav"))


@POSIX
def test_csv_with_a_name_that_is_not_utf8(tmp_path):
    try:
        touch(tmp_path, os.fsdecode(b"\xe9.wav"))
    except OSError:
        pytest.skip("this file system refuses the name")
    (clip,) = read("csv", table(tmp_path, b"file\n\xe9.wav\n"))
    assert os.fsencode(os.path.basename(clip.file)) == b"\xe9.wav" and clip.name == "\\udce9.wav"


def test_csv_absolute_paths(tmp_path):
    audio = touch(tmp_path / "elsewhere", "a.wav") / "a.wav"
    (clip,) = read("csv", table(tmp_path, f"file\n{audio}\n"))
    assert clip.file == str(audio)


def test_csv_speaker_in_two_splits(tmp_path):
    text = "file,split,speaker\na.wav,train,Ann\nb.wav,test,Ann\nc.wav,test,Bob\nd.wav,,Bob\n"
    with pytest.raises(CorpusError, match=r"1 speaker is in more than one split \(Ann: train, test\)"):
        read("csv", table(tmp_path, text, "a.wav", "b.wav", "c.wav", "d.wav"))


# --- MSP-Podcast -------------------------------------------------------------------------------------------------------

MSP = """FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set
MSP-PODCAST_0001_0001.wav,H,7,4,1,127,Female,Train
MSP-PODCAST_0001_0002.wav,N,1.0,2.5,5.5,Unknown,Unknown,Development
MSP-PODCAST_0002_0001.wav,A,5.2,2.2,5.8,8,Male,Test1
MSP-PODCAST_0003_0001.wav,A,4,4,4,9,Male,Test2
MSP-PODCAST_0004_0001.wav,,,,,,,Test3
"""


def msp(tmp_path, text=MSP, table_name="labels_consensus.csv"):
    touch(tmp_path, *(f"Audios/{line.split(',')[0]}" for line in MSP.splitlines()[1:]))
    touch(tmp_path, f"Labels/{table_name}").joinpath("Labels", table_name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("table_name", ["labels_consensus.csv", "labels_concensus.csv"])
@pytest.mark.parametrize("validation", ["Development", "Validation"])
def test_msp_podcast(tmp_path, table_name, validation):
    train, dev, test = read("msp-podcast", msp(tmp_path, MSP.replace("Development", validation), table_name))
    # by hand from MSP: (7-1)/6, (1-1)/6, (4-1)/6; a swap of EmoVal and EmoDom would show
    assert (train.arousal, train.dominance, train.valence) == (1.0, 0.0, 0.5)
    assert (dev.arousal, dev.dominance, dev.valence) == (0.0, 0.75, 0.25)
    assert (test.arousal, test.dominance, test.valence) == pytest.approx((0.7, 0.8, 0.2))
    assert [clip.split for clip in (train, dev, test)] == ["train", "validation", "test"]
    assert [clip.speaker for clip in (train, dev, test)] == ["127", None, "8"]
    assert train.name == "Audios/MSP-PODCAST_0001_0001.wav" and os.path.isfile(train.file)


def test_msp_podcast_other_tests(tmp_path):
    msp(tmp_path)
    assert names(read("msp-podcast", tmp_path, test="Test2"))[2:] == ["Audios/MSP-PODCAST_0003_0001.wav"]
    third = read("msp-podcast", tmp_path, test="Test3")[2]
    assert third.split == "test" and third.arousal is third.dominance is third.valence is third.speaker is None
    with pytest.raises(UsageError, match="test must be one of Test1, Test2, Test3, got 'Test4'"):
        read("msp-podcast", tmp_path, test="Test4")


def test_msp_podcast_columns_go_by_name(tmp_path):
    text = "EmoDom,Split_Set,EmoVal,SpkrID,FileName,EmoAct\n1,Train,4,127,MSP-PODCAST_0001_0001.wav,7\n"
    (clip,) = read("msp-podcast", msp(tmp_path, text))
    assert (clip.arousal, clip.dominance, clip.valence) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("H,7,", "H,7.5,", r"1 x rating outside 1\.\.7 \(line 2: EmoAct 7\.5\)"),
        ("H,7,", "H,0,", r"rating outside 1\.\.7 \(line 2: EmoAct 0\)"),
        ("H,7,", "H,high,", r"rating outside 1\.\.7 \(line 2: EmoAct high\)"),
        ("Female,Train", "Female,train set", r"unknown Split_Set .*\(line 2: train set\)"),
        ("0001_0001", "0009_0001", "1 x missing file"),
        ("0001_0002", "0001_0001", r"1 x duplicate \(line 3: as line 2\)"),
        ("8,Male", "127,Male", r"1 speaker is in more than one split \(127: train, test\)"),
        ("EmoAct", "Activation", "no column EmoAct in its first line; found: FileName, EmoClass, Activation"),
    ],
)
def test_msp_podcast_errors(tmp_path, old, new, message):
    with pytest.raises(CorpusError, match=message):
        read("msp-podcast", msp(tmp_path, MSP.replace(old, new)))


def test_msp_podcast_that_is_none(tmp_path):
    with pytest.raises(CorpusError, match=r"is no MSP-Podcast: expected Labels/labels_consensus\.csv"):
        read("msp-podcast", tmp_path)


# --- IEMOCAP -----------------------------------------------------------------------------------------------------------

# As the corpus has it: header, turns in the order V, A, D, lines of single raters, blank lines.
IEMOCAP = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\t{dialog}_F000\tneu\t[2.0000, 3.0000, 5.0000]
C-E2:\tNeutral;\t()
C-E3:\tNeutral;\t()
A-E3:\tval 2; act 4; dom  4;\t()
A-F1:\tval 3; act 2; dom  1;\t()

[10.0100 - 11.3925]\t{dialog}_M000\txxx\t[2.5000, 1.0000, 4.5000]
A-E4:\tval 9; act 9; dom  9;\t(mixed emotion)

"""


def iemocap(tmp_path, text=IEMOCAP, sessions=range(1, 6)):
    for session in sessions:
        dialog = f"Ses{session:02d}F_impro01"
        root = tmp_path / f"Session{session}"
        touch(root, *(f"sentences/wav/{dialog}/{dialog}_{turn}.wav" for turn in ("F000", "M000")))
        touch(root / "dialog" / "EmoEvaluation", f"{dialog}.txt", f"._{dialog}.txt", f"Categorical/{dialog}_e2_cat.txt")
        (root / "dialog" / "EmoEvaluation" / f"{dialog}.txt").write_text(text.format(dialog=dialog))
    return tmp_path


def test_iemocap(tmp_path):
    clips = read("iemocap", iemocap(tmp_path))
    assert len(clips) == 10
    first, second = clips[:2]
    assert first.name == "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav" and os.path.isfile(first.file)
    assert (first.start, first.end, first.speaker, second.speaker) == (0.0, None, "Ses01F", "Ses01M")
    # by hand: [V, A, D] = [2, 3, 5] and [2.5, 1, 4.5] on 1..5; any swap would show
    assert (first.arousal, first.dominance, first.valence) == (0.5, 1.0, 0.25)
    assert (second.arousal, second.dominance, second.valence) == (0.0, 0.875, 0.375)
    assert [clip.split for clip in clips[::2]] == ["train"] * 3 + ["validation", "test"]
    clips = read("iemocap", tmp_path, validation_session="1", test_session=2)
    assert [clip.split for clip in clips[::2]] == ["validation", "test"] + ["train"] * 3


def test_iemocap_with_windows_line_ends(tmp_path):
    assert len(read("iemocap", iemocap(tmp_path, IEMOCAP.replace("\n", "\r\n"), sessions=[2]))) == 2


def test_iemocap_out_of_range(tmp_path):
    iemocap(tmp_path, IEMOCAP.replace("4.5000]", "5.5000]"), sessions=[1, 2])
    with pytest.raises(CorpusError) as caught:
        read("iemocap", tmp_path)
    assert "2 x rating outside 1..5 (Ses01F_impro01.txt:9: value 5.5000; Ses02F_impro01.txt:9:" in str(caught.value)
    with pytest.warns(CorpusWarning, match=r"2 turns with values outside 1\.\.5 left out"):
        clips = read("iemocap", tmp_path, out_of_range="drop")
    assert [clip.speaker for clip in clips] == ["Ses01F", "Ses02F"]
    with pytest.raises(UsageError, match="out_of_range must be one of error, drop, got 'clip'"):
        read("iemocap", tmp_path, out_of_range="clip")


def test_iemocap_errors(tmp_path):
    with pytest.raises(CorpusError, match="no turns in .*; expected SessionN/dialog/EmoEvaluation"):
        read("iemocap", tmp_path)
    for options in ({"test_session": 6}, {"validation_session": 5}, {"test_session": "last"}, {"test_session": None}):
        with pytest.raises(UsageError, match="two different sessions of 1 to 5"):
            read("iemocap", tmp_path, **options)
    iemocap(tmp_path, IEMOCAP.replace("[2.0000, 3.0000, 5.0000]", "[2.0000, 3.0000]"), sessions=[3])
    (tmp_path / "Session3/sentences/wav/Ses03F_impro01/Ses03F_impro01_M000.wav").unlink()
    with pytest.raises(CorpusError, match=r"1 x not a turn .*Ses03F_impro01\.txt:3.* 1 x missing file .*txt:9"):
        read("iemocap", tmp_path)


# --- splits ------------------------------------------------------------------------------------------------------------


def clip(name, **fields):
    return Clip(file="/" + name, name=name, **fields)


def test_check_splits():
    check_splits([clip("1", split="train", speaker="a"), clip("2", speaker="a"), clip("3", split="test")])
    with pytest.raises(CorpusError, match=r"1 group is in more than one split \(g: train, validation\)"):
        check_splits([clip("1", split="validation", group="g"), clip("2", split="train", group="g")])
    many = [clip(f"{s}{i}", split=s, speaker=f"speaker{i}") for i in range(9) for s in ("train", "test")]
    with pytest.raises(CorpusError, match=r"9 speakers are in .*speaker4: train, test; and 4 more\)"):
        check_splits(many)


def test_assign_splits_keeps_units_and_fractions():
    clips = [clip(f"{s}/{i}", speaker=f"speaker{s}") for s in range(40) for i in range(3 + s % 7)]
    clips += [clip(f"g{g}/{i}", group=f"group{g}") for g in range(20) for i in range(5)]
    clips += [clip(f"single{i}") for i in range(100)]
    clips += [clip(f"file{f}", start=float(i), end=i + 1.0) for f in range(20) for i in range(4)]
    done = assign_splits(clips)
    assert [dataclasses.replace(c, split=None) for c in done] == clips
    check_splits(done)
    of_file = defaultdict(set)
    for c in done:
        of_file[c.file].add(c.split)
    assert all(len(splits) == 1 for splits in of_file.values())
    counts = Counter(c.split for c in done)
    for split, fraction in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert abs(counts[split] - fraction * len(clips)) <= 9  # the largest unit
    assert assign_splits(clips) == done
    assert assign_splits(clips[::-1])[::-1] == done
    assert assign_splits(clips, seed=1) != done


def test_assign_splits_is_the_same_everywhere():
    # Frozen on purpose: other splits for the same data would make results incomparable.
    clips = [clip(str(i), speaker=f"s{i}") for i in range(10)]
    assert "".join(c.split[1] for c in assign_splits(clips)) == "rerarrarrr"


def test_assign_splits_few_units():
    for n, expected, empty in ((1, 1, "validation and test stay"), (2, 2, "(validation|test) stays"), (3, 3, ""), (4, 3, "")):
        clips = [clip(f"{s}/{i}", speaker=str(s)) for s in range(n) for i in range(10)]
        with pytest.warns(CorpusWarning, match=empty) if empty else warnings.catch_warnings():
            assert len({c.split for c in assign_splits(clips)}) == expected
    done = assign_splits([clip(str(i)) for i in range(50)], fractions=(0.8, 0, 0.2))
    assert Counter(c.split for c in done) == {"train": 40, "test": 10}
    assert assign_splits([]) == []


def test_an_empty_split_is_said_with_the_way_out(tmp_path):
    touch(tmp_path, *(f"dataset/{i:02d}.wav" for i in range(49)))
    clips = read("folder", tmp_path, split_by="folder")
    with pytest.warns(CorpusWarning, match=r"validation and test stay empty: 49 of 49 clips share the group dataset.*folders"):
        assert Counter(c.split for c in assign_splits(clips)) == {"train": 49}
    assert {c.split for c in assign_splits(clips, fractions=(1, 0, 0))} == {"train"}  # asked for: no warning


def test_assign_splits_respects_what_is_given():
    clips = [clip("1", split="test", speaker="a"), clip("2", speaker="a"), clip("3", split="validation")]
    clips += [clip(f"n{i}") for i in range(17)]
    done = assign_splits(clips)
    assert [c.split for c in done[:3]] == ["test", "test", "validation"]
    assert Counter(c.split for c in done) == {"train": 14, "validation": 3, "test": 3}
    with pytest.raises(CorpusError, match="more than one split"):
        assign_splits([clip("1", split="test", speaker="a"), clip("2", split="train", speaker="a"), clip("3")])
    parts = [clip("x", start=0.0, end=1.0, split="test"), clip("x", start=1.0, end=2.0, split="train")]
    assert assign_splits(parts) == parts
    with pytest.raises(CorpusError, match="x has no split, and its .* is shared with clips of test and train"):
        assign_splits([*parts, clip("x", start=2.0)])


def test_assign_splits_arguments():
    for fractions in ((0.5, 0.5), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (float("nan"),) * 3):
        with pytest.raises(UsageError, match="fractions of train, validation and test"):
            assign_splits([clip("1")], fractions)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([None, *"abcdef"]), st.sampled_from([None, *"uvwxyz"]), st.integers(0, 9)),
        max_size=40,
    ),
    st.integers(0, 5),
)
def test_assigned_splits_never_share(rows, seed):
    clips = [clip(f"f{f}", speaker=s, group=g, start=float(i)) for i, (s, g, f) in enumerate(rows)]
    warnings.simplefilter("ignore")  # few clips: a split may stay empty
    done = assign_splits(clips, seed=seed)
    check_splits(done)
    assert all(c.split for c in done)
    assert len({(c.file, c.split) for c in done}) == len({c.file for c in done})


# --- one recording in two splits ---------------------------------------------------------------------------------------


@pytest.fixture
def twice(tmp_path):
    """24 recordings, each there twice, as in a public data set; with another one of each size."""
    for number in range(24):
        for folder in ("one", "two"):
            touch(tmp_path, f"{folder}/{number:02d}.wav").joinpath(folder, f"{number:02d}.wav").write_bytes(
                bytes([number]) * 9000
            )
    touch(tmp_path, "head.wav", "tail.wav", "middle.wav")
    (tmp_path / "head.wav").write_bytes(b"h" + bytes([3]) * 8999)
    (tmp_path / "tail.wav").write_bytes(bytes([3]) * 8999 + b"t")
    (tmp_path / "middle.wav").write_bytes(bytes([3]) * 4500 + b"m" + bytes([3]) * 4499)
    return tmp_path


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_recording_stay_in_one_split(twice, seed):
    clips = read("folder", twice)
    assert len(clips) == 51
    found = r"24 files have the content of another file \(two/00\.wav is one/00\.wav; .*; and 21 more\)"
    with pytest.warns(CorpusWarning, match=found):
        done = assign_splits(clips, seed=seed)
    of_recording = defaultdict(set)
    for c in done:
        if "/" in c.name:
            of_recording[c.name[-6:]].add(c.split)
    assert len(of_recording) == 24 and all(len(splits) == 1 for splits in of_recording.values())
    counts = Counter(c.split for c in done)
    assert (counts["train"], counts["validation"], counts["test"]) == pytest.approx((35.7, 7.65, 7.65), abs=2)


def test_copies_follow_the_split_that_one_of_them_has(twice):
    text = "file,split\none/00.wav,test\ntwo/00.wav,\none/01.wav,train\none/02.wav,validation\n"
    (twice / "labels.csv").write_text(text)
    with pytest.warns(CorpusWarning, match=r"1 file has the content of another file \(two/00\.wav is one/00\.wav\)"):
        done = assign_splits(read("csv", twice / "labels.csv"))
    assert [c.split for c in done] == ["test", "test", "train", "validation"]


def test_copies_in_two_given_splits_are_refused_or_left_out_of_training(twice):
    rows = [("one", n, "train") for n in range(10)] + [("two", n, "test") for n in range(4)] + [("two", 7, "validation")]
    text = "file,split\n" + "".join(f"{folder}/{n:02d}.wav,{split}\n" for folder, n, split in rows)
    (twice / "labels.csv").write_text(text)
    with pytest.raises(CorpusError) as caught:
        read("csv", twice / "labels.csv")
    message = str(caught.value)
    assert (
        "5 clips are in another split as well, by the content of their files (one/00.wav (train) is two/00.wav (test);"
        in message
    )
    assert "and 2 more" in message and "--leaks drop" in message and "\n" not in message
    with pytest.warns(CorpusWarning, match=r"5 clips are in another split as well.*; left out of train$"):
        clips = read("csv", twice / "labels.csv", leaks="drop")
    assert names(clips) == [f"{folder}/{n:02d}.wav" for folder, n, _ in rows if folder == "two" or n in (4, 5, 6, 8, 9)]
    with pytest.raises(UsageError, match="leaks must be one of error, drop, got 'keep'"):
        read("csv", twice / "labels.csv", leaks="keep")


def test_segments_that_overlap_across_splits_are_refused_or_left_out(tmp_path):
    source = table(
        tmp_path,
        "file,start,end,split\n"
        "a.wav,0,2,train\na.wav,2,4,validation\na.wav,4.0005,6,test\n"  # these touch, up to rounding
        "b.wav,0,3,train\nb.wav,2.5,4,test\nb.wav,4,,validation\n"
        "c.wav,,,test\nc.wav,7,8,validation\nc.wav,9,9.5,train\nd.wav,,,train\n",
        *("a.wav", "b.wav", "c.wav", "d.wav"),
    )
    with pytest.raises(CorpusError) as caught:
        read("csv", source)
    expected = (
        "3 segments overlap one of another split (b.wav from 0 s to 3 s (train) and b.wav from 2.5 s to 4 s (test); c.wav"
    )
    assert expected in str(caught.value)
    with pytest.warns(CorpusWarning, match="left out of train and validation"):
        clips = read("csv", source, leaks="drop")
    kept = [(c.name[0], c.split) for c in clips]
    assert kept == [
        *(("a", "train"), ("a", "validation"), ("a", "test")),
        *(("b", "test"), ("b", "validation"), ("c", "test"), ("d", "train")),
    ]


def test_segments_of_copies_overlap_too(twice):
    rows = ["one/00.wav,0,1,train", "two/00.wav,0.5,1.5,test", "one/01.wav,0,1,train", "two/01.wav,1,2,test"]
    text = "file,start,end,split\n" + "\n".join(rows)
    (twice / "labels.csv").write_text(text)
    with pytest.raises(CorpusError, match=r"1 clip is in another split as well.*one/00\.wav from 0 s to 1 s \(train\) is"):
        read("csv", twice / "labels.csv")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.integers(0, 20),
            st.one_of(st.none(), st.integers(1, 8)),
            st.sampled_from([None, "train", "validation", "test"]),
        ),
        max_size=12,
        unique_by=lambda row: row[:3],
    )
)
def test_leaks_are_those_of_every_pair(rows):
    clips = [clip(f, start=float(s), end=None if n is None else float(s + n), split=split) for f, s, n, split in rows]

    def overlap(a, b):
        return a.file == b.file and a.start < (b.end or 99) and b.start < (a.end or 99)

    found = find_leaks(clips)
    assert all(overlap(a, b) and ("train", "validation", "test").index(a.split) < ("train", "validation", "test").index(b.split)
               for a, b in found)  # fmt: skip
    warnings.simplefilter("ignore")
    kept = drop_leaks(clips)
    pairs = [(a, b) for a in clips for b in clips if a.split and b.split and a.split != b.split and overlap(a, b)]
    assert bool(pairs) == bool(found)
    assert not any(a in kept and b in kept for a, b in pairs)
    # nothing is left out that shares nothing with what is kept
    assert all(
        any(overlap(c, other) and c.split != other.split for other in kept if other.split) for c in clips if c not in kept
    )


def test_equal_samples_in_two_splits_are_refused_whatever_the_file():
    clips = [
        clip("a.wav", split="train"),
        clip("a.flac", split="test"),
        clip("b.wav", split="train"),
        clip("c.wav", split="train"),
    ]
    check_decoded(clips, ["x", "y", "z", "z"])
    check_decoded(clips, [None, None, "z", "z"])
    with pytest.raises(
        CorpusError, match=r"1 clip is in another split as well, by their samples \(a\.flac \(test\) is a\.wav \(train"
    ):
        check_decoded(clips, ["x", "x", "y", "z"])


# --- clips that are of no use ------------------------------------------------------------------------------------------


def test_ends_beyond_the_file_and_silence_are_failures_that_say_why(tmp_path):
    """Seconds written as milliseconds, a slip, a rounded duration, and digital silence."""
    for name, wave in (("a", voice(3.2, 1)), ("b", voice(3.2, 2)), ("silent", np.zeros(32_000))):
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
    source = table(tmp_path, "file,start,end\na.wav,0,3200\na.wav,0.5,7\na.wav,1,3.25\nb.wav,,\nsilent.wav,,\n")
    clips = [dataclasses.replace(c, split="train") for c in read("csv", source)]
    about = bank.build(clips, tmp_path / "bank")
    assert (about["clips"], about["failures"]) == (2, 3)
    with open(tmp_path / "bank" / "failures.csv", newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert reasons == [
        "the file ends at 3.2 s, but the clip is to end at 3200 s (times are in seconds; are these milliseconds?)",
        "the file ends at 3.2 s, but the clip is to end at 7 s (no end: to the end)",
        "silent: every sample is zero, so there is nothing to learn from",
    ]
    assert bank.Bank(tmp_path / "bank").clips["samples"].tolist() == [35_200, 51_200]
