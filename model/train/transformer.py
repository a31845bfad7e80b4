"""Training the transformer and its text encoder together, by flow matching."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.config import ClipShape, DiTConfig
from model.network.diffusion import at_model_times, blend, denoise, guide, noise, schedule
from model.network.dit import DiT
from model.network.layers import Attention, attention, short_attention
from model.network.text import TextEncoder, small_encoder, word_tokenizer
from model.network.vae import VAE
from model.train.clips import scene_of
from model.train.config import PROMPT_TOKENS, SPOKEN, TrainConfig
from model.train.data import Bucket
from model.train.latents import end_lengths, ends_path, latents_of, sampling_weights
from model.train.loop import Checkpoint, divide, follow, part_of, run, set_rate
from model.world.captions import describe

TEXT_LAYERS, TEXT_HEADS = 2, 4


class Writer(nn.Module):
    """Transformer and text encoder: what flow matching trains together."""

    def __init__(self, config: DiTConfig, words: Sequence[str] = SPOKEN) -> None:
        super().__init__()
        tokenizer = word_tokenizer(words, PROMPT_TOKENS)
        encoder = small_encoder(len(tokenizer), config.text_dim, TEXT_LAYERS, TEXT_HEADS)
        self.text = TextEncoder(encoder, tokenizer, PROMPT_TOKENS)
        self.dit = DiT(config)

    def attend_with(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        for module in self.dit.modules():
            if isinstance(module, Attention):
                module.attend = function

    def forward(self, latents: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        """latents [B, C, T, H, W], times [B, T] -> velocity like latents."""
        ids, mask = self.text.tokens(prompts)
        return self.dit(latents, times, self.text(ids.to(latents.device), mask.to(latents.device)))


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """[B] times: logit-normal shifted towards noise by 2, 10 % uniform, and 30 % from the last tenth.

    Which way a solid slides is settled above 0.95; without that last part too few steps lie there and left and right
    stay at chance while the loss hardly shows it.
    """
    normal = torch.randn(count, generator=generator).sigmoid()
    even, late, which = (torch.rand(count, generator=generator) for _ in range(3))
    times = 2 * normal / (1 + normal)
    times = torch.where(which < 0.10, even, times)
    return torch.where(which > 0.70, 0.9 + 0.1 * late, times)


def draw_known(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """[B, T] True where a latent frame is given.

    As many at the start, at the end or at both as the modes give (25 % of clips), or any at random (3 %); never all.
    """
    which, some = torch.rand(count, generator=generator), torch.rand(count, frames, generator=generator)
    length = torch.randint(1, max(2, frames - 1), (2, count, 1), generator=generator)
    place = torch.arange(frames)
    known = torch.zeros(count, frames, dtype=torch.bool)
    if frames > 1:
        known[which < 0.08, 0] = True
        starts = ((which >= 0.08) & (which < 0.14)) | ((which >= 0.20) & (which < 0.25))
        ends = (which >= 0.14) & (which < 0.25)
        known |= starts[:, None] & (place < length[0])
        known |= ends[:, None] & (place >= frames - length[1])
        known |= (which > 0.97)[:, None] & (some < torch.rand(count, 1, generator=generator))
        known[known.all(1)] = False
    return known


class Stock:
    """The clips of one shape that the transformer is trained on, as latents."""

    def __init__(self, config: TrainConfig, bucket: Bucket) -> None:
        self.latents = latents_of(config, bucket)
        path = ends_path(config, bucket)
        self.ends = load_file(path)["ends"] if path.exists() else self.latents[:0]
        self.lengths = end_lengths(bucket)
        self.clips = range(config.held_back, len(self.latents))
        self.weights = sampling_weights(config, bucket, self.clips)

    def draw(self, known: Tensor, rng: random.Random) -> tuple[list[int], Tensor]:
        """The numbers of B clips, and their latents [B, C, T, H, W], of which the frames `known` [B, T] are given.

        A request knows the end of its clip but not what leads to it: the encoded end is of a picture that stood still
        before (as `Canvas.known` has it), while what is to be made did lead to it. Where such ends lie ready they are
        taken.
        """
        chosen = rng.choices(self.clips, cum_weights=self.weights, k=len(known))
        at_end: list[int] = known.flip(1).cumprod(1).sum(1).tolist()
        count = len(self.lengths)
        rows = [row for row, length in enumerate(at_end) if length in self.lengths and len(self.ends)]
        for row in rows:
            place = rng.randrange(-(-self.clips.start // count), len(self.ends) // count)
            chosen[row] = place * count + self.lengths.index(at_end[row])
        clean = self.latents[chosen].float()
        for row in rows:
            clean[row, :, -at_end[row] :] = self.ends[chosen[row], :, -at_end[row] :].float()
        return chosen, clean


def train_dit(config: TrainConfig) -> None:
    """Flow matching over all shapes; the rate warms up, stays, and falls to 0 over the last quarter."""
    stocks = {bucket.name: Stock(config, bucket) for bucket in config.buckets}
    torch.manual_seed(config.seed)
    writer = Writer(config.dit, config.words)
    writer.dit.init_weights()
    writer.to(config.device)
    if config.device == "cpu":
        writer.attend_with(short_attention)
    average = copy.deepcopy(writer).requires_grad_(False)
    groups = [
        {"params": list(writer.text.parameters()), "scale": config.text_rate / config.dit_rate},
        {"params": list(writer.dit.parameters())},
    ]
    optimizer = torch.optim.AdamW(groups, config.dit_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    zero = divide(config, writer, optimizer) if config.zero and config.ranks > 1 else None
    parallel = zero or (nn.parallel.DistributedDataParallel(writer) if config.ranks > 1 else writer)
    modules = {"writer": writer, "average": average}
    checkpoint = Checkpoint(config.work / "dit.safetensors", modules, optimizer, zero, config.rank)
    shares = [b.share for b in config.buckets]

    def learn(step: int) -> dict[str, float]:
        share = step / config.dit_steps
        rate = config.dit_rate * min(1, (step + 1) / 100, (1 - share) / 0.25)
        set_rate(optimizer, rate + 1e-6)
        rng = random.Random(f"{config.seed}/dit/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        bucket = rng.choices(config.buckets, shares)[0]
        known = draw_known(bucket.batch, stocks[bucket.name].latents.shape[2], generator)
        chosen, clean = stocks[bucket.name].draw(known, rng)
        prompts = [caption(config, bucket, k, rng) for k in chosen]
        prompts = ["" if rng.random() < 0.1 else p for p in prompts]
        times = draw_times(len(clean), generator)[:, None].expand_as(known).masked_fill(known, 0.0)
        disturbance = torch.randn(clean.shape, generator=generator)
        # Every rank draws the whole batch and computes its part: however many they are, the step is the same.
        mine = slice(config.rank, None, config.ranks)
        weight = (~known)[:, None, :, None, None].float() / (~known).float().mean()
        target, predicted = step_of(parallel, clean[mine], times[mine], prompts[mine], disturbance[mine], config)
        error = (predicted - target).square() * weight[mine].to(predicted)
        loss = error.mean() * (len(error) * config.ranks / len(clean))
        if zero:
            zero.step(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(writer.parameters(), config.clip)
            optimizer.step()
        follow(average, writer, step, config.average)
        return {"loss": loss.item()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        bucket = config.buckets[0]
        stock = stocks[bucket.name].latents[: config.held_back].float()
        generator = torch.Generator().manual_seed(1)
        rng = random.Random(1)
        losses: list[float] = []
        for first in range(0, len(stock), 32):
            clean = stock[first : first + 32]
            times = ((torch.arange(len(clean)) % 16 + 0.5) / 16)[:, None].expand(-1, clean.shape[2])
            prompts = [caption(config, bucket, first + k, rng) for k in range(len(clean))]
            disturbance = torch.randn(clean.shape, generator=generator)
            target, predicted = step_of(average, clean, times, prompts, disturbance, config)
            losses.append((predicted - target).square().mean().item())
        return {
            "held_out_loss": sum(losses) / len(losses),
            "words_apart": words_apart(average.text),
            "places_apart": places_apart(average.text),
        }

    run(config, "dit", config.dit_steps, checkpoint, learn, validate)


@torch.no_grad()
def words_apart(text: TextEncoder) -> float:
    """How far the encodings of two words in one place differ: the tenth percentile over all pairs.

    1.4 would be unrelated, 0 the same. A text encoder that has collapsed hardly shows in the loss (skies and colours
    may still be told apart), but here.
    """
    words = [word for word in text.tokenizer.get_vocab() if word.isalpha()][:200]
    encoded = text.encode([f"a {word}" for word in words])[:, 1]
    return (torch.pdist(encoded) / encoded.shape[1] ** 0.5).quantile(0.1).item()


@torch.no_grad()
def places_apart(text: TextEncoder) -> float:
    """How far the encodings of one word in two places differ, as a share of how far those of two words in one place do.

    Which of two solids a colour belongs to is nowhere else to be read. Near 0 an encoder is deaf to the order of words.
    """
    words = [word for word in text.tokenizer.get_vocab() if word.isalpha()][:40]
    ahead, behind = text.encode([f"a {w} x x a y" for w in words]), text.encode([f"a y x x a {w}" for w in words])
    places = (ahead[:, 1] - behind[:, 5]).norm(dim=1).mean()
    return (places / torch.pdist(ahead[:, 1]).mean()).item()


def caption(config: TrainConfig, bucket: Bucket, index: int, rng: random.Random) -> str:
    if config.captions is not None:
        return config.captions[bucket.name][index]
    return describe(scene_of(config.seed, bucket, index), rng, frames=bucket.shape.frames)


def step_of(
    writer: Callable[..., Tensor],
    clean: Tensor,
    times: Tensor,
    prompts: list[str],
    disturbance: Tensor,
    config: TrainConfig,
) -> tuple[Tensor, Tensor]:
    """(target, predicted) velocities of clips [B, C, T, H, W] at times [B, T]."""
    clean, disturbance, times = (tensor.to(config.device) for tensor in (clean, disturbance, times))
    mixed = blend(clean, disturbance, times[:, None, :, None, None])
    with config.autocast():
        predicted = writer(mixed, times, prompts)
    return disturbance - clean, predicted.float()


@torch.no_grad()
def sample(
    dit: DiT,
    text: TextEncoder,
    vae: VAE,
    prompts: Sequence[str],
    shape: ClipShape,
    seeds: Iterable[int],
    *,
    steps: int,
    guidance: float,
    solver: str,
    shift: float,
) -> Tensor:
    """Clips [B, 3, T, H, W] in -1..1 of one batch on one device, without an engine: for a look, or a score."""
    device = next(dit.parameters()).device
    size = vae.latent_shape(shape)
    x = torch.stack([noise(seed, size) for seed in seeds]).to(device)
    encoded = text.encode([*prompts, *("" for _ in prompts)])

    def velocity(x: Tensor, now: float) -> Tensor:
        both = dit(torch.cat((x, x)), torch.full((2 * len(x),), now, device=device), encoded)
        with_text, without = both.chunk(2)
        return guide(with_text, without, guidance)

    for latents in denoise(at_model_times(velocity, solver), x, schedule(steps, shift, solver), solver):
        x = latents
    return vae.decode(x)


def trained_writer(config: TrainConfig) -> Writer:
    """The averaged weights of the last checkpoint."""
    writer = Writer(config.dit, config.words)
    writer.load_state_dict(part_of(load_file(config.work / "dit.safetensors"), "average"))
    writer.attend_with(attention)
    return writer.to(config.device).eval().requires_grad_(False)
