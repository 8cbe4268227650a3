"""Write an encoder's or autoencoder's weights under the names of other projects.

    python -m extras.export --checkpoint runs/mse/checkpoint.pt --format timm --out encoder.pt
    python -m extras.export --checkpoint runs/mse/checkpoint.pt --format hf --out mae.safetensors

--format mae: as published (He et al. 2022), with the decoder where it is a plain MAE's; timm: the
encoder, for its ViTs; hf: Hugging Face transformers' ViTMAEForPreTraining, of a plain MAE. Takes
checkpoints of train.py and extras/siblings.py. Ends with the lines that load the file there. The
tables of names, and reading, are model.py's.
"""

import argparse
from pathlib import Path

import torch

import model
import train
from train import fail, say

# What those networks take; ours normalise by themselves.
NORMALISED = f"(images - {model.IMAGENET_MEAN}) / {model.IMAGENET_STD}, images in [0, 1]"
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


def loading_lines(path, names, saved):
    """Python that loads the file where it goes. saved: the checkpoint's arguments."""
    load, first = f"torch.load({str(path)!r})", f"# it takes {NORMALISED}\nimport torch\n"
    if str(path).endswith(".safetensors"):
        load = f"safetensors.torch.load_file({str(path)!r})"
        first += "import safetensors.torch\n"
    elif names == "mae":
        load += "['model']"
    side, patch = saved["image_size"], saved["patch_size"]
    size = model.MAE_SIZES[saved["model"]]
    width, depth, heads = (size[k] for k in ("width", "depth", "heads"))
    C, blocks, decoder_heads = (size[f"decoder_{k}"] for k in ("width", "depth", "heads"))
    if names == "timm":
        return (
            f"{first}from timm.models import VisionTransformer\n"
            f"vit = VisionTransformer({side}, {patch}, num_classes=0, embed_dim={width}, "
            f"depth={depth}, num_heads={heads})\n"
            f"vit.load_state_dict({load})\n"
            "# vit.forward_features(images): (B, 1 + N, C), as our encoder's"
        )
    if names == "hf":
        return (
            f"{first}from transformers import ViTMAEConfig, ViTMAEForPreTraining\n"
            f"config = ViTMAEConfig(image_size={side}, patch_size={patch}, hidden_size={width}, "
            f"num_hidden_layers={depth}, num_attention_heads={heads}, "
            f"intermediate_size={4 * width}, decoder_hidden_size={C}, "
            f"decoder_num_hidden_layers={blocks}, decoder_num_attention_heads={decoder_heads}, "
            f"decoder_intermediate_size={4 * C}, layer_norm_eps=1e-6)\n"
            "mae = ViTMAEForPreTraining.from_pretrained(None, config=config, "
            f"state_dict={load})"
        )
    return (
        f"{first}from functools import partial\nfrom torch import nn\n"
        "from models_mae import MaskedAutoencoderViT  # of the published MAE\n"
        f"mae = MaskedAutoencoderViT({side}, {patch}, embed_dim={width}, depth={depth}, "
        f"num_heads={heads}, decoder_embed_dim={C}, decoder_depth={blocks}, "
        f"decoder_num_heads={decoder_heads}, norm_layer=partial(nn.LayerNorm, eps=1e-6))\n"
        f"mae.load_state_dict({load}, strict=False)  # its decoder, too, if the file has one"
    )


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line -> namespace."""
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's weights under the names of other projects.",
        usage="python -m extras.export --checkpoint FILE [--format mae|timm|hf] --out FILE",
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
    if Path(args.out).resolve() == Path(args.checkpoint).resolve():
        fail(f"--out {args.out} is the checkpoint itself: name another file")
    with train.refusals():
        checkpoint = model.load_file(args.checkpoint, kind)
        if not any(train.made_by(script, checkpoint, "mae") for script in SCRIPTS):
            fail(f"{args.checkpoint} is not {kind}, whose weights this script writes")
        weights = checkpoint["mae"]
        kept = chosen(weights, args.format)
        written = to_hf(kept) if args.format == "hf" else kept
        write_weights(args.out, written, args.format)
    left_out = ", ".join(sorted({k.split(".")[0] for k in weights.keys() - kept.keys()}))
    say(f"wrote {args.out}: {len(written)} tensors; left out: {left_out or 'none'}; to load it:")
    say(loading_lines(args.out, args.format, checkpoint["arguments"]))


if __name__ == "__main__":
    train.run_script(main)
