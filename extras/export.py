"""Write an encoder's or autoencoder's weights under the names of other projects.

    python -m extras.export --checkpoint runs/mse/checkpoint.pt --format timm --out encoder.pt
    python -m extras.export --checkpoint runs/mse/checkpoint.pt --format hf --out mae.safetensors

--format mae: as published (He et al. 2022), with the decoder where it is a plain MAE's; timm: the
encoder, for its ViTs; hf: Hugging Face transformers' ViTMAEForPreTraining, of a plain MAE. Takes
checkpoints of train.py and extras/siblings.py. The tables of names, and reading, are model.py's.
"""

import argparse
from pathlib import Path

import torch

import model
import train
from train import fail, say

SCRIPTS = ("train.py", "extras/siblings.py")  # whose networks are encoders with something more


# ---- Names ---------------------------------------------------------------------------------------


def ours_alone(weights):
    """Names of weights in no other project: MSG-MAE's skips and scales, and a sibling's own."""
    shared = (*model.ENCODER, *model.DECODER)
    return [k for k in weights if not k.startswith(shared) or k.startswith(model.OURS_ALONE)]


def to_hf(weights):
    """Weights of a plain `MAE` -> those of transformers' ViTMAEForPreTraining.

    ValueError for networks that it cannot express: MSG-MAE, several scales, siblings.
    """
    if extra := ours_alone(weights):
        raise ValueError(
            f"transformers has no place for {extra[0]} and {len(extra) - 1} more of these weights; "
            "the names of timm and mae take the encoder alone"
        )
    out = {}
    for name, value in weights.items():
        names = model.hf_names(name)
        out |= dict(zip(names, value.chunk(len(names)), strict=True))
    return out


def chosen(weights, names):
    """Weights of one of our networks -> those that go into a file of the format `names`.

    The encoder alone for timm, and for mae where the network is more than a plain MAE.
    """
    if names == "timm" or (names == "mae" and ours_alone(weights)):
        return {k: v for k, v in weights.items() if k.startswith(model.ENCODER)}
    return weights


# ---- File ----------------------------------------------------------------------------------------


def write_weights(path, weights, names):
    """Write {name: tensor} of the format `names`: .safetensors, or else a file of torch.save.

    ValueError, in one line, if that cannot be.
    """
    weights = {k: v.contiguous() for k, v in weights.items()}
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save

            Path(path).write_bytes(save(weights))
        else:
            with open(path, "wb") as file:
                torch.save({"model": weights} if names == "mae" else weights, file)
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"cannot write {path}: {reason}") from None


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line -> namespace."""
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's weights under the names of other projects.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="of train.py or extras/siblings.py")
    parser.add_argument(
        "--format", choices=("mae", "timm", "hf"), default="mae", help="whose names to take"
    )
    parser.add_argument("--out", required=True, help="file to write: .safetensors, or torch's")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    kind = "a checkpoint of train.py or extras/siblings.py"
    with train.refusals():
        checkpoint = model.load_file(args.checkpoint, kind)
        if not any(train.made_by(script, checkpoint, "mae") for script in SCRIPTS):
            fail(f"{args.checkpoint} is not {kind}, whose weights this script writes")
        weights = checkpoint["mae"]
        kept = chosen(weights, args.format)
        written = to_hf(kept) if args.format == "hf" else kept
        write_weights(args.out, written, args.format)
    left_out = ", ".join(sorted({k.split(".")[0] for k in weights.keys() - kept.keys()}))
    say(f"wrote {args.out}: {len(written)} tensors; left out: {left_out or 'none'}")


if __name__ == "__main__":
    train.run_script(main)
