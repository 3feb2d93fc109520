import csv
import dataclasses
import os
import sys
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import bank
from w2s_jax.artifacts import UsageError
from w2s_jax.corpora import CORPORA, Clip, CorpusError, CorpusWarning, assign_splits, check_splits, read

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="links and any bytes in names")


@pytest.fixture(autouse=True)
def strict():
    """A warning is an error unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def touch(root, *names):
    """Adapters look at names only, so the audio is one byte."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
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
    for n, expected in ((1, 1), (2, 2), (3, 3), (4, 3)):
        clips = [clip(f"{s}/{i}", speaker=str(s)) for s in range(n) for i in range(10)]
        assert len({c.split for c in assign_splits(clips)}) == expected
    done = assign_splits([clip(str(i)) for i in range(50)], fractions=(0.8, 0, 0.2))
    assert Counter(c.split for c in done) == {"train": 40, "test": 10}
    assert assign_splits([]) == []


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
    done = assign_splits(clips, seed=seed)
    check_splits(done)
    assert all(c.split for c in done)
    assert len({(c.file, c.split) for c in done}) == len({c.file for c in done})
