# ---- Names ---------------------------------------------------------------------------------------


def to_hf(weights):
    """Weights of a plain `MAE` -> those of transformers' ViTMAEForPreTraining.

    ValueError for networks that it cannot express: MSG-MAE, or several scales.
    """
    extra = [k for k in weights if k.startswith(OURS_ALONE)]
    if extra:
        raise ValueError(
            f"transformers has no place for {extra[0]} and {len(extra) - 1} more of these weights; "
            "the names of timm and mae take the encoder alone"
        )
    out = {}
    for name, value in weights.items():
        names = hf_names(name)
        out |= dict(zip(names, value.chunk(len(names)), strict=True))
    return out


def write_weights(path, weights, names):
    """Write an autoencoder's weights for another project -> (tensors written, left out).

    names: "mae", as published: with the decoder where it is a plain MAE's; "timm": the encoder;
    "hf": transformers' ViTMAEForPreTraining. path: .safetensors, or else a file of torch.save.
    """
    encoder = {k: v for k, v in weights.items() if not k.startswith(DECODER)}
    plain = not any(k.startswith(OURS_ALONE) for k in weights)
    written = weights if plain and names == "mae" else encoder
    if names == "hf":
        written = to_hf(weights)
    written = {k: v.contiguous() for k, v in written.items()}
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import save

            Path(path).write_bytes(save(written))
        else:
            with open(path, "wb") as file:
                torch.save({"model": written} if names == "mae" else written, file)
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"cannot write {path}: {reason}") from None
    return len(written), 0 if names == "hf" else len(weights) - len(written)


# ---- Command -------------------------------------------------------------------------------------


def export(args):
    """--export FILE: write --checkpoint's weights by --format's names; says what it left out."""
    if not is_main():
        return
    with train.refusals():
        checkpoint = model.load_file(args.checkpoint, "a checkpoint of train.py")
        if not train.made_by("train.py", checkpoint, "mae"):
            fail(
                f"{args.checkpoint} is not a checkpoint of train.py, whose weights --export writes"
            )
        count, rest = model.write_weights(args.export, checkpoint["mae"], args.format)
    say(f"wrote {args.export}: {count} tensors; left out: {rest}, of decoder or teacher")


