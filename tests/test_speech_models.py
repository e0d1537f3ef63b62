"""Recurrent networks that nobody edited, on a recorded telephone call: who speaks, and whether anybody does.

The recording, 30 seconds of two women with a table of who speaks when, ships with pyannote-audio. Resemblyzer tells
voices apart with an LSTM of three layers, silero-vad finds speech with convolutions and an LSTM cell.
"""

import importlib
import importlib.util
import json
import math
import sys
import types
import wave

import numpy as np
import pytest
import torch

import pyops
from pyops.demo.packages import package_folder

RATE = 16000
PACKAGES = {"pyannote": "pyannote-audio", "resemblyzer": "Resemblyzer", "silero_vad": "silero-vad"}


def folder(package):
    try:
        return package_folder(package)
    except ModuleNotFoundError:
        pytest.skip(f"{PACKAGES[package]} is not installed (requirements/demo-no-deps.txt)")


@pytest.fixture(scope="module")
def call():
    """The samples in [-1, 1]."""
    with wave.open(str(folder("pyannote") / "audio" / "sample" / "sample.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15


@pytest.fixture(scope="module")
def turns():
    """``[(speaker, first second, last second)]``, by hand, from the package."""
    rows = (folder("pyannote") / "audio" / "sample" / "sample.rttm").read_text().splitlines()
    fields = [row.split() for row in rows]
    return [(f[7], float(f[3]), float(f[3]) + float(f[4])) for f in fields]


# Whose voice


def mel_spectrogram(samples):
    """Power in 40 mel bands of 25 ms every 10 ms [frames, 40]: what Resemblyzer asks of librosa.

    Bands are triangles of unit area between 42 points, equally far on the mel scale of Slaney's Auditory Toolbox:
    linear up to 1 kHz, then 27 steps for a factor of 6.4.
    """
    step = math.log(6.4) / 27
    mel = np.linspace(0, 15 + math.log(RATE / 2 / 1000) / step, 42)
    hertz = torch.tensor(np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * step)))[:, None]
    low, peak, high = hertz[:-2], hertz[1:-1], hertz[2:]
    bins = torch.linspace(0, RATE / 2, 201, dtype=torch.float64)
    bands = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0) * 2 / (high - low)
    window = torch.hann_window(400)
    spectrum = torch.stft(torch.from_numpy(samples), 400, 160, window=window, pad_mode="constant", return_complex=True)
    return (bands.float() @ spectrum.abs().square()).T.numpy()


@pytest.fixture
def encoder(monkeypatch):
    """Resemblyzer's VoiceEncoder, unmodified; only the sound files and spectrograms of its package need librosa."""
    package = types.ModuleType("resemblyzer")
    package.__path__ = [str(folder("resemblyzer"))]
    package.audio = types.SimpleNamespace(wav_to_mel_spectrogram=mel_spectrogram)
    for name in [name for name in sys.modules if name.split(".")[0] == "resemblyzer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "resemblyzer", package)
    module = importlib.import_module("resemblyzer.voice_encoder")
    yield module.VoiceEncoder("cpu", verbose=False)
    for name in [name for name in sys.modules if name.startswith("resemblyzer.")]:
        del sys.modules[name]


def at_thirty_decibels(samples):
    """As loud as Resemblyzer wants it."""
    return samples * (10 ** (-30 / 20) / np.sqrt(np.mean(samples**2)))


def test_speaker_encoder(encoder, call, turns):
    """Resemblyzer: embeddings agree with torch's, and two turns of one voice are closer than any of two voices."""
    long = [turn for turn in turns if turn[2] - turn[1] > 3]
    speakers = [speaker for speaker, _, _ in long]
    samples = [at_thirty_decibels(call[int(begin * RATE) : int(end * RATE)]) for _, begin, end in long]
    expected = np.stack([encoder.embed_utterance(s) for s in samples])
    with pyops.use() as report:
        ours = np.stack([encoder.embed_utterance(s) for s in samples])
    assert report.entries["lstm"].backends == {"cpu": len(long)} and not report.entries["lstm"].kept
    assert np.abs(ours - expected).max() <= 1e-5

    likeness = ours @ ours.T
    same = np.equal.outer(speakers, speakers)
    assert len(long) == 4 and likeness[same].min() > likeness[~same].max() + 0.03


# Whether anybody speaks


class VoiceActivity(torch.nn.Module):
    """silero-vad at 16 kHz: the probability that 512 samples, after the 64 before them, are speech."""

    def __init__(self):
        super().__init__()
        self.stft_conv = torch.nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = torch.nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = torch.nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = torch.nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = torch.nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = torch.nn.LSTMCell(128, 128)
        self.final_conv = torch.nn.Conv1d(128, 1, 1)

    def forward(self, x, state):
        x = self.stft_conv(torch.nn.functional.pad(x[:, None], (0, 64), "reflect"))
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = torch.nn.functional.relu(conv(x))
        h, c = self.lstm_cell(x.squeeze(2), state)
        return self.final_conv(h.relu()[..., None]).sigmoid().flatten(), (h, c)


def published_weights():
    data = bytearray((folder("silero_vad") / "data" / "silero_vad_16k.safetensors").read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    return {
        name: torch.frombuffer(
            data, dtype=torch.float32, count=math.prod(entry["shape"]), offset=begin + entry["data_offsets"][0]
        ).reshape(entry["shape"])
        for name, entry in json.loads(data[8:begin]).items()
    }


def pieces(call):
    """The call as four streams side by side: [4, steps * 512] after 64 samples of silence."""
    streams = torch.from_numpy(call).reshape(4, -1)
    return torch.nn.functional.pad(streams, (64, -streams.shape[1] % 512))


def probabilities(network, streams):
    """Of each stream and step [4, steps], one step after the other."""
    state, found = None, []
    with torch.no_grad():
        for at in range(64, streams.shape[1], 512):
            p, state = network(streams[:, at - 64 : at + 512], state)
            found.append(p)
    return torch.stack(found, 1)


def test_voice_activity_network_is_the_published_one(call):
    """The class above, with the weights of the package's TorchScript file, gives what that file gives."""
    script = torch.jit.load(folder("silero_vad") / "data" / "silero_vad.jit")
    network = VoiceActivity()
    weights = [w for name, w in script.state_dict().items() if "_8k" not in name]
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    streams = pieces(call)[:, : 64 + 40 * 512]
    with torch.no_grad():
        expected = [script(streams[:, at : at + 512], RATE)[:, 0] for at in range(64, streams.shape[1], 512)]
    torch.testing.assert_close(probabilities(network, streams), torch.stack(expected, 1), rtol=0, atol=1e-5)


def test_voice_activity(call, turns):
    """silero-vad: probabilities agree with torch's; speech where people speak, none in the silence before."""
    network = VoiceActivity()
    network.load_state_dict(published_weights())
    streams = pieces(call)
    expected = probabilities(network, streams)
    with pyops.use() as report:
        ours = probabilities(network, streams)
    steps = ours.shape[1]
    for op, calls in (("lstm_cell", steps), ("conv1d", 6 * steps), ("relu", 5 * steps)):
        entry = report.entries[op]
        assert entry.backends == {"cpu": calls} and not entry.kept
    assert (ours - expected).abs().max() <= 1e-5

    seconds = (torch.arange(steps) + 0.5) * 512 / RATE + torch.arange(4)[:, None] * len(call) / RATE / 4
    spoken = torch.stack([(seconds > begin) & (seconds < end) for _, begin, end in turns]).any(0)
    assert (ours[spoken] > 0.5).float().mean() > 0.95
    assert ours[seconds < turns[0][1] - 0.1].max() < 0.5
