"""The text side: two small tokenizers, and a CLIP and a T5 encoder pre-trained to tell the captions apart.

Random frozen encoders would not do. FLUX gives its text tokens no position, so "red ... with blue" and "blue ... with
red" differ only in what T5 itself wrote into its tokens. A minute of training on an auxiliary task (say both colours
and the shape back from the output) makes it write that down.

T5's padding is a part of FLUX's input, as no attention mask is used: a caption of 10 tokens in 512 comes with 502 pads.
So the T5 trains at several lengths, its words must come out the same at each, and its pads must come out as one
constant vector, which a transformer can learn to overlook.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from examples.shapes import ALL_PAIRS, COLORS, GENERIC_SHAPE, TEMPLATES, TRAIN_SHAPES, caption
from examples.tiny_flux.architecture import CLIP_LENGTH, TEXT_WIDTH, make_clip, make_t5

SHORT_LENGTH = 16
"""T5 tokens that hold every caption: the longest has 10."""
COLOR_NAMES = tuple(COLORS)


@dataclass
class TextOptions:
    """How the text encoders are trained."""

    num_steps: int = 1600
    """The task is solved after about 1000."""
    batch_size: int = 64
    """Captions per step at the short length; fewer at longer ones, for about the same number of tokens."""
    learning_rate: float = 3e-3
    """The highest, after 30 steps of warm-up; it falls linearly to zero."""
    seed: int = 0
    """Of the captions and the weights."""


@dataclass
class TextSide:
    """Tokenizers and encoders of one pipeline."""

    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel

    FOLDERS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")

    def save(self, folder: Path) -> None:
        """Write the four parts under their names in a pipeline folder."""
        for name in self.FOLDERS:
            getattr(self, name).save_pretrained(folder / name)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "TextSide":
        """Read what `save` wrote, frozen and in evaluation mode."""
        return cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
            CLIPTextModel.from_pretrained(folder / "text_encoder").to(device).eval().requires_grad_(False),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2").to(device).eval().requires_grad_(False),
        )

    def ids(self, captions: Sequence[str], t5_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids as FLUX makes them: CLIP (B, 77) and T5 (B, L), padded and cut to length."""

        def tokenize(tokenizer: CLIPTokenizer | T5TokenizerFast, length: int) -> torch.Tensor:
            return tokenizer(
                list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids

        return tokenize(self.tokenizer, CLIP_LENGTH), tokenize(self.tokenizer_2, t5_length)

    @torch.no_grad()
    def embed(self, captions: Sequence[str], t5_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, L, 64) and pooled embeddings (B, 64) of captions."""
        clip_ids, t5_ids = self.ids(captions, t5_length)
        pooled = self.text_encoder(clip_ids.to(self.text_encoder.device)).pooler_output
        return self.text_encoder_2(t5_ids.to(self.text_encoder_2.device)).last_hidden_state, pooled


def make_clip_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """Byte-level BPE as CLIP's, with the merges that `texts` call for; other text falls apart into bytes."""
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges)]
    # CLIP's special tokens come last: its pooling once took the highest id of a caption for its end.
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def make_t5_tokenizer(texts: Sequence[str]) -> T5TokenizerFast:
    """A unigram tokenizer as T5's: the words of `texts` whole, all else spelled out in printable ASCII characters."""
    words = sorted({word for text in texts for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -1.0) for word in words if len(word) > 1]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def vocabulary_texts() -> list[str]:
    """Every caption of the training shapes and of the generic one. The names of held-out shapes are not among them."""
    return [
        caption(foreground, shape, background, template)
        for foreground, background in ALL_PAIRS
        for shape in (*TRAIN_SHAPES, GENERIC_SHAPE)
        for template in range(len(TEMPLATES))
    ]


def invented_word(rng: np.random.Generator) -> str:
    """Three to eight random letters: a shape nobody has heard of, so that a new word does not upset the colours."""
    return "".join(chr(code) for code in rng.integers(ord("a"), ord("z") + 1, int(rng.integers(3, 9))))


class _Task(nn.Module):
    """Auxiliary task: the shape and both colours, as RGB and as name, read off CLIP's pooled output and T5's tokens.

    Of T5's tokens it reads three weighted means (foreground, background, shape), weighted by one learned query each, as
    the transformer's attention may later do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_colors, self.num_shapes = len(COLOR_NAMES), len(TRAIN_SHAPES) + 1
        self.from_clip = nn.Linear(TEXT_WIDTH, 2 * (3 + self.num_colors) + self.num_shapes)
        self.queries = nn.Parameter(0.3 * torch.randn(3, TEXT_WIDTH))
        self.from_t5 = nn.ModuleList([nn.Linear(TEXT_WIDTH, 3 + self.num_colors) for _ in range(2)])
        self.shape_from_t5 = nn.Linear(TEXT_WIDTH, self.num_shapes)
        self.pad = nn.Parameter(torch.randn(TEXT_WIDTH))

    def clip_answers(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled (B, 64) -> answers (B, 2 * (3 + colours) + shapes)."""
        return self.from_clip(pooled)

    def t5_answers(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, 64) -> answers (B, 2 * (3 + colours) + shapes)."""
        weights = torch.softmax(torch.einsum("qd,bld->bql", self.queries, tokens) / TEXT_WIDTH**0.5, dim=-1)
        means = weights @ tokens
        colors = [read(means[:, index]) for index, read in enumerate(self.from_t5)]
        return torch.cat([*colors, self.shape_from_t5(means[:, 2])], dim=1)

    def loss(self, answers: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Cross entropy of names and shape plus squared error of RGB. `truth` (B, 3): foreground, background, shape."""
        palette = torch.tensor(list(COLORS.values()), device=truth.device).float() / 127.5 - 1
        width = 3 + self.num_colors
        total = F.cross_entropy(answers[:, 2 * width :], truth[:, 2])
        for index in range(2):
            color = answers[:, index * width : (index + 1) * width]
            total = total + F.mse_loss(color[:, :3], palette[truth[:, index]])
            total = total + F.cross_entropy(color[:, 3:], truth[:, index])
        return total


def _questions(rng: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    """Random captions and their truth (B, 3). One in six names no known shape: the generic word or an invented one."""
    captions, truth = [], []
    for _ in range(count):
        foreground, background = ALL_PAIRS[rng.integers(len(ALL_PAIRS))]
        index = int(rng.integers(len(TRAIN_SHAPES)))
        shape = TRAIN_SHAPES[index]
        if rng.random() < 1 / 6:
            index = len(TRAIN_SHAPES)
            shape = GENERIC_SHAPE if rng.random() < 0.5 else invented_word(rng)
        captions.append(caption(foreground, shape, background, int(rng.integers(len(TEMPLATES)))))
        truth.append((COLOR_NAMES.index(foreground), COLOR_NAMES.index(background), index))
    return captions, torch.tensor(truth)


def train_text(options: TextOptions, device: torch.device) -> TextSide:
    """Make the tokenizers and train both encoders on the auxiliary task."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    texts = vocabulary_texts()
    tokenizer, tokenizer_2 = make_clip_tokenizer(texts), make_t5_tokenizer(texts)
    clip, t5 = make_clip(tokenizer).to(device), make_t5(tokenizer_2).to(device)
    text = TextSide(tokenizer, tokenizer_2, clip, t5)
    task = _Task().to(device)
    parameters = [*clip.parameters(), *t5.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    lengths = np.array([SHORT_LENGTH, 32, 77, 128, 256, 512])
    began = time.monotonic()
    for step in range(options.num_steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * min((step + 1) / 30, 1 - step / options.num_steps)
        # Every other step at the short length, else at a longer one with a smaller batch of about as many tokens.
        length = int(rng.choice(lengths)) if step % 2 else SHORT_LENGTH
        captions, truth = _questions(rng, max(4, options.batch_size * SHORT_LENGTH // length))
        truth = truth.to(device)
        clip_ids, t5_ids = (ids.to(device) for ids in text.ids(captions, length))
        pooled = clip(clip_ids).pooler_output
        tokens = t5(t5_ids).last_hidden_state
        is_pad = t5_ids == tokenizer_2.pad_token_id
        loss = task.loss(task.clip_answers(pooled), truth) + task.loss(task.t5_answers(tokens), truth)
        pad_loss = ((tokens - task.pad)[is_pad] ** 2).mean()
        # What the words say may not depend on how many pads follow: compared with the same captions without most pads.
        short = t5(t5_ids[:, :SHORT_LENGTH]).last_hidden_state if length > SHORT_LENGTH else tokens
        word = ~is_pad[:, :SHORT_LENGTH]
        drift = ((tokens[:, :SHORT_LENGTH] - short)[word] ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + pad_loss + drift).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"text: step {step + 1}/{options.num_steps} {time.monotonic() - began:.0f} s length {length} "
                f"task {loss.item():.4f} pads {pad_loss.item():.4f} drift {drift.item():.4f}",
                flush=True,
            )
    for encoder in (clip, t5):
        encoder.eval().requires_grad_(False)
    return text
