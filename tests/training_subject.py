"""A tiny model in training: log-probabilities without gradients, a loss with them.

The trainer's batches hold the rows of the sampler's batches among others, at another place, padded
to another length.  A `shift`, zero, is added to what the model embeds: its gradient is that of a
row's own input, next to those of the weights.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import bicompile

VOCABULARY = 61
HIDDEN = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "bert": lambda: transformers.BertConfig(**SIZES, **NO_DROPOUT),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=160,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=VOCABULARY,
        **NO_DROPOUT,
    ),
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=VOCABULARY
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4
    ),
}
IMAGES = ("vit", "resnet")
LONGEST = {"mamba": 6}
"""Tokens of a row, where a graph holds every step of a loop over them."""
AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
    "resnet": transformers.AutoModelForImageClassification,
}


def tiny(name: str, dtype: torch.dtype, layers: int = 1) -> Any:
    """A random model that is trained, with weights so large that rows differ in all bits.

    The batch norms of ResNet go by running statistics, and its weights are about 1.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    config.use_cache = False
    if name == "mixtral" and dtype is torch.float64:  # the default has no such kernel
        config._experts_implementation = "eager"
    model = AUTO.get(name, transformers.AutoModelForCausalLM).from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if name != "resnet":
        return model.to(dtype).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.02, 0.1)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Batch:
    """Rows of tokens [B, T] or images [B, C, H, W], and what each row's terms weigh in the loss."""

    rows: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor
    weight: torch.Tensor

    def double(self) -> Batch:
        """The same with images in float64."""
        return self if self.mask is not None else replace(self, rows=self.rows.double())

    def part(self, rows: slice) -> Batch:
        """Some rows, with the padding of all."""
        mask = None if self.mask is None else self.mask[rows]
        return Batch(self.rows[rows], mask, self.labels[rows], self.weight[rows])

    def among(self, other: Batch, junk: int) -> Batch:
        """These rows behind those of `other`, padded on the right, padding full of tokens."""
        if self.mask is None:
            pairs = ((getattr(b, n) for b in (other, self)) for n in ("rows", "labels", "weight"))
            rows, labels, weight = (torch.cat(list(pair)) for pair in pairs)
            return Batch(rows, None, labels, weight)
        length = max(self.rows.shape[1], other.rows.shape[1])

        def join(name: str, fill: int) -> torch.Tensor:
            both = (getattr(b, name) for b in (other, self))
            return torch.cat([F.pad(t, (0, length - t.shape[1]), value=fill) for t in both])

        return Batch(join("rows", junk), join("mask", 0), join("labels", junk), join("weight", 0))


def make_batch(name: str, lengths: tuple[int, ...], seed: int, device: str = "cpu") -> Batch:
    """Random rows; of those of tokens, the next token is the label (BERT: the token itself)."""
    rng = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), LONGEST.get(name, max(lengths))
    lengths = tuple(min(length, longest) for length in lengths)
    if name in IMAGES:
        labels = torch.randint(VOCABULARY, (count, 1), generator=rng)
        images = torch.randn(count, 3, 16, 16, generator=rng)
        weight = torch.rand(count, 1, generator=rng) + 0.5
        return Batch(images.to(device), None, labels.to(device), weight.to(device))
    tokens = torch.randint(3, VOCABULARY, (count, max(lengths)), generator=rng)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    weight = (torch.rand(tokens.shape, generator=rng) + 0.5) * mask
    labels = tokens
    if name != "bert":
        labels = tokens.roll(-1, 1)
        weight = weight * mask.roll(-1, 1)
        weight[:, -1] = 0
    return Batch(*(t.to(device) for t in (tokens, mask, labels, weight)))


class _InDouble(TorchFunctionMode):
    """What a model computes in float32, whatever its weights are, is computed in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        wide = lambda a: torch.float64 if a is torch.float32 else a  # noqa: E731
        return function(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


@dataclass(frozen=True)
class Step:
    """What a training step computes: log-probabilities of the labels, the loss, the gradients."""

    log_probabilities: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        """All of it, in a fixed order."""
        return [self.log_probabilities, self.loss, *self.gradients.values()]


class Trained:
    """A tiny model whose one function is compiled for use with and without gradients."""

    def __init__(
        self,
        name,
        dtype=torch.float32,
        *,
        layers=1,
        autocast=False,
        checkpointing=False,
        device="cpu",
        compile=bicompile.compile,
        **kwargs,
    ):
        self.name, self.dtype, self.autocast, self.device = name, dtype, autocast, device
        self.model = tiny(name, dtype, layers).to(device)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.function = compile(self._function, **kwargs)

    def batch(self, *lengths, seed=0):
        """Random rows of these lengths."""
        batch = make_batch(self.name, lengths, seed, self.device)
        if batch.mask is None:
            batch = replace(batch, rows=batch.rows.to(self.dtype))
        return batch

    def _function(self, rows, shift, mask, labels, weight=None):
        how = contextlib.nullcontext()
        if self.autocast:
            how = torch.autocast(self.device, torch.bfloat16)
        elif self.dtype is torch.float64:
            how = _InDouble()
        with how:
            if mask is None:
                logits = self.model(pixel_values=rows + shift).logits.unsqueeze(1)
            else:
                embedded = self.model.get_input_embeddings()(rows) + shift
                logits = self.model(inputs_embeds=embedded, attention_mask=mask).logits
        wide = logits if logits.dtype is torch.float64 else logits.float()
        if weight is None:  # as a sampler spells it
            return wide.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        terms = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
        terms = terms.view(labels.shape)
        return -terms, (terms * weight).sum()

    def _call(self, batch, shift, *weight):
        """Lengths may vary from call to call: one graph serves all."""
        inputs = batch.rows, shift, batch.mask, batch.labels, *weight
        for tensor in inputs if batch.mask is not None else ():
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self.function(*inputs)

    def shift(self, batch):
        shape = batch.rows.shape if batch.mask is None else (*batch.rows.shape, HIDDEN)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def log_probabilities(self, batch):
        """Without gradients: [B, T]."""
        with torch.no_grad():
            return self._call(batch, self.shift(batch))

    def step(self, batch, *, parts=1):
        """Loss and all gradients, added up over `parts` of the batch."""
        self.model.zero_grad()
        size = -(-len(batch.rows) // parts)
        found = []
        for first in range(0, len(batch.rows), size):
            part = batch.part(slice(first, first + size))
            shift = self.shift(part).requires_grad_()
            log_probabilities, loss = self._call(part, shift, part.weight)
            loss.backward()
            found.append((log_probabilities.detach(), loss.detach(), shift.grad))
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        gradients["the input"] = torch.cat([f[2] for f in found])
        gradients = {n: g.detach().clone() for n, g in gradients.items()}
        losses = torch.stack([f[1] for f in found]).sum()
        return Step(torch.cat([f[0] for f in found]), losses, gradients)
