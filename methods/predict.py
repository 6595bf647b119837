"""Predict the classes of new images with a trained run.

    python -m methods.predict runs/cyclecluster-digits-... photo.png folder/ more.npz

Images are files, folders of files, or .npz files with uint8 images (N, H, W) or (N, H, W, 3) in `x` or else `x_test`.
Writes CSV (image, label, confidence) to the terminal, or to the file that --output names.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods.common import autoencoder, networks
from methods.common.errors import UserError
from methods.common.images import find_images, read_images
from methods.common.run import load_checkpoint, write_whole
from methods.common.sources import read_npz_images
from methods.common.training import infer, pick_device


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m methods.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("images", type=Path, nargs="+", help="image files, folders, .npz files")
    parser.add_argument("--output", type=Path, help="CSV file to write instead of the terminal")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; auto takes CUDA where it is usable")
    parser.add_argument("--invert", action="store_true", help="swap dark and bright first (ink on white paper)")
    arguments = parser.parse_args(argv)
    try:
        table = predict(arguments.run, arguments.images, arguments.device, arguments.invert)
        if arguments.output is None:
            sys.stdout.write(table)
        else:
            write_whole(arguments.output, lambda file: file.write(table.encode()))
    except (UserError, OSError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    return 0


def predict(run: Path, images: list[Path], device_name: str = "auto", invert: bool = False) -> str:
    """CSV text: image, label, confidence. Files that cannot be read are named on stderr and left out."""
    device = pick_device(device_name)
    network, architecture, class_names = load_network(run, device)
    names, pixels = read_all(images, architecture["n_channels"], architecture["image_size"])
    if invert:
        pixels = 255 - pixels
    probability = infer(lambda x: network(x)[:, : len(class_names)].softmax(1), pixels.to(device)).cpu()
    confidence, label = probability.max(dim=1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "confidence"])
    for name, index, certain in zip(names, label.tolist(), confidence.tolist(), strict=True):
        writer.writerow([name, class_names[index], f"{certain:.4f}"])
    return text.getvalue()


def load_network(run: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """A run's network in evaluation mode, what it was built from, and the names of its classes."""
    checkpoint = load_checkpoint(run)
    if checkpoint is None:
        raise UserError(f"{run} holds no checkpoint.pt")
    state = checkpoint["state"]
    build = autoencoder.build if state["architecture"]["name"] == autoencoder.NAME else networks.build
    network = build(**state["architecture"])
    network.load_state_dict(state["network"])
    return network.to(device).eval(), state["architecture"], tuple(state["class_names"])


def read_all(paths: list[Path], n_channels: int, image_size: tuple[int, int]) -> tuple[list[str], Tensor]:
    """All images as one uint8 tensor (N, C, H, W), with a name for each."""
    names: list[str] = []
    stacks: list[Tensor] = []
    for path in paths:
        if path.suffix == ".npz":
            stack = read_npz_images(path, n_channels, image_size)
            names += [f"{path}[{index}]" for index in range(len(stack))]
        else:
            stack, files, unreadable = read_images(find_images(path), n_channels, image_size)
            names += map(str, files)
            for file, reason in unreadable:
                print(f"predict: left out {file}: {reason}", file=sys.stderr)
        stacks.append(stack)
    if not names:
        raise UserError("none of these images could be read")
    return names, torch.cat(stacks)


if __name__ == "__main__":
    sys.exit(main())
