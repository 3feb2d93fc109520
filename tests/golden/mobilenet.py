"""Make mobilenet.npz: what timm's MobileNets compute, with weights that a seed gives, from images that a seed gives.

    python tests/golden/mobilenet.py tests/golden/mobilenet.npz

Needs torch and timm 1.0; the tests need only ``weights`` and ``image`` below, which are numpy. Real trunks are too large for a
file in this repository, so it holds names and shapes of their arrays, which ``weights`` fills the same way everywhere.
Arrays of the file, for each NAME in SEEDS:

    keys/NAME                    timm's state dict without head and counters, as a JSON string {key: shape}
    features/NAME/FRAMESxMELS    timm's ``forward_features`` of ``image(FRAMES, MELS)``, float32 [frames, mels, channels]
    timm                         its version
"""

import json
import sys

import numpy as np

SEEDS = {
    "mobilenetv3_small_100": 1,
    "mobilenetv3_large_100": 2,
    "mobilenetv4_conv_small": 3,
    "mobilenetv4_conv_medium": 4,
    "mobilenetv4_conv_large": 5,
    "mobilenetv3_small_050": 6,
    "mobilenetv4_conv_small_050": 7,
}
#: Frames and mel bands: odd and even numbers of both, and one frame alone.
SIZES = ((101, 26), (75, 64), (1, 26))


def image(frames: int, mels: int) -> np.ndarray:
    """Noise with an offset, as log-mel images have one: float32 [frames, mels]."""
    return np.random.default_rng([frames, mels]).normal(-2, 3, (frames, mels)).astype(np.float32)


def weights(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """A state dict in which every number counts: no scale is 1, no shift or mean 0, no variance 1, no gate closed."""
    rng = np.random.default_rng(seed)
    state = {}
    for key in sorted(shapes):
        shape, leaf = shapes[key], key.rsplit(".", 1)[-1]
        if leaf == "running_var":
            value = rng.uniform(0.6, 1.6, shape)
        elif leaf == "weight" and len(shape) == 1:
            value = rng.uniform(0.7, 1.3, shape)
        elif leaf == "weight":
            value = rng.standard_normal(shape, dtype=np.float32) * np.float32(1.3 / np.sqrt(np.prod(shape[1:])))
        else:
            value = 0.3 * rng.standard_normal(shape)
        state[key] = np.asarray(value, np.float32)
    return state


def timm_module():
    """timm, also where torchvision's compiled operators do not fit torch: no MobileNet needs them, but imports name them."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm, library  # the definitions last as long as the library does


def mobilenet_golden() -> dict[str, np.ndarray]:
    """The arrays of mobilenet.npz."""
    import torch

    timm, _library = timm_module()
    arrays = {"timm": np.array(timm.__version__)}
    for name, seed in SEEDS.items():
        model = timm.create_model(name, in_chans=1).eval()
        own = {
            key: list(value.shape)
            for key, value in model.state_dict().items()
            if not key.startswith(("classifier.", "conv_head.", "norm_head.")) and not key.endswith("num_batches_tracked")
        }
        state = {key: torch.from_numpy(value) for key, value in weights(own, seed).items()}
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        arrays[f"keys/{name}"] = np.array(json.dumps(own))
        for frames, mels in SIZES:
            with torch.no_grad():
                features = model.forward_features(torch.from_numpy(image(frames, mels))[None, None])
            arrays[f"features/{name}/{frames}x{mels}"] = features[0].permute(1, 2, 0).numpy()
    return arrays


def state_of(golden, name: str) -> dict[str, np.ndarray]:
    """The state dict with which timm computed the golden file's features."""
    return weights(json.loads(str(golden[f"keys/{name}"])), SEEDS[name])


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **mobilenet_golden())
