"""Say what bicompile does with each node of a model, without running it: pages, lock files."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from bicompile import explanation_page, explanation_text, subjects
from bicompile.explainer import explain
from bicompile.lock import Lock

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {"static": False, "batch": None, "dynamic": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bicompile explain`."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a hub id, a folder with a config.json, or module:function, which returns "
        "(model, args, kwargs); left out: the small model of the demo",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the model's own)")
    parser.add_argument("--batch", type=int, default=2, help="rows of the inputs (default: 2)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a row (default: 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="need not be there")
    parser.add_argument(
        "--shapes", choices=SHAPES, default="static", help="which sizes vary (default: none)"
    )
    parser.add_argument("--training", action="store_true", help="also explain the gradient")
    parser.add_argument("--all", action="store_true", help="a row for every node")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write both graphs as a page")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the page as a PNG")
    parser.add_argument("--show", default="", help="of the picture: search=TEXT&node=NAME")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="write what the bits depend on")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail if a lock file differs")


def run(args: argparse.Namespace) -> int:
    """Explain a program and write what was asked for."""
    subject = subjects.load(
        args.model,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        batch=args.batch,
        length=args.length,
    )
    found = explain(
        subject.model,
        *subject.args,
        dynamic=SHAPES[args.shapes],
        device=args.device,
        training=args.training,
        **subject.kwargs,
    )
    console = Console(highlight=False)
    if not (args.lock or args.check or args.json or args.html or args.picture or args.open):
        console.print(explanation_text.renderable(found, all=args.all, width=console.width))
        return 0
    if args.json:
        args.json.write_text(found.json())
    if args.html or args.picture or args.open:
        page = found.html(args.html or Path("explain.html"))
        console.print(f"{page}: {page.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
        if args.picture:
            explanation_page.draw(page, args.picture, hash=args.show)
        if args.open:
            explanation_page.open_page(page)
    lock = Lock.of(found)
    if args.check:
        lock.check(args.check)
        console.print(f"{args.check}: the same numbers, {len(lock.steps)} steps", soft_wrap=True)
    if args.lock:
        lock.write(args.lock)
        console.print(f"{args.lock}: {len(lock.steps)} steps, digest {lock.digest}", soft_wrap=True)
    return 0
