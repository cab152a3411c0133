"""The published VQGANs of taming-transformers and LlamaGen, written down independently."""

import torch
import torch.nn.functional as F
from torch import Tensor

CH, MULTIPLIERS, BLOCKS, Z, IMAGE = 32, (1, 2, 2), 2, 16, (32, 48)


def reference_weights(
    project: str,
    multipliers: tuple[int, ...] = MULTIPLIERS,
    *,
    channels: int = CH,
    codes: int = 40,
    dim: int = 8,
) -> dict[str, Tensor]:
    """Random weights of a published VQGAN, by the names in its state dict."""
    random = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, before: int, after: int, side: int) -> None:
        fan_in = before * side * side
        weight = torch.randn(after, before, side, side, generator=random) * fan_in**-0.5
        state[f"{name}.weight"] = weight
        state[f"{name}.bias"] = torch.randn(after, generator=random) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=random)

    def block(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", before, after, 3)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after, 3)
        if before != after:
            conv(f"{name}.nin_shortcut", before, after, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths = [channels * m for m in multipliers]
    last = len(widths) - 1
    taming = project != "llamagen"
    mid = ("block_1", "attn_1", "block_2") if taming else ("0", "1", "2")
    inner = "block" if taming else "res"
    for side in ("encoder", "decoder"):
        conv(
            f"{side}.conv_in",
            3 if side == "encoder" else Z,
            channels if side == "encoder" else widths[-1],
            3,
        )
        block(f"{side}.mid.{mid[0]}", widths[-1], widths[-1])
        attention(f"{side}.mid.{mid[1]}", widths[-1])
        block(f"{side}.mid.{mid[2]}", widths[-1], widths[-1])
    width = channels
    for level in range(last + 1):
        name = f"encoder.down.{level}" if taming else f"encoder.conv_blocks.{level}"
        for number in range(BLOCKS):
            block(f"{name}.{inner}.{number}", width, widths[level])
            width = widths[level]
            if level == last:
                attention(f"{name}.attn.{number}", width)
        if level < last:
            conv(f"{name}.downsample.conv", width, width, 3)
    for level in reversed(range(last + 1)):
        name = f"decoder.up.{level}" if taming else f"decoder.conv_blocks.{last - level}"
        for number in range(BLOCKS + 1):
            block(f"{name}.{inner}.{number}", width, widths[level])
            width = widths[level]
            if level == last:
                attention(f"{name}.attn.{number}", width)
        if level > 0:
            conv(f"{name}.upsample.conv", width, width, 3)
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], Z, 3)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3, 3)
    conv("quant_conv", Z, dim, 1)
    conv("post_quant_conv", dim, Z, 1)
    if project == "gumbel":
        conv("quantize.proj", dim, codes, 1)
        state["quantize.embed.weight"] = torch.randn(codes, dim, generator=random)
    else:
        state["quantize.embedding.weight"] = torch.randn(codes, dim, generator=random)
    return state


class Reference:
    """The published forward pass, straight from such a state dict."""

    def __init__(self, project: str, state: dict[str, Tensor], levels: int) -> None:
        self.project, self.state = project, state
        self.taming = project != "llamagen"
        self.mid = ("block_1", "attn_1", "block_2") if self.taming else ("0", "1", "2")
        self.inner = "block" if self.taming else "res"
        self.last = levels - 1

    def conv(self, x: Tensor, name: str, **options: int) -> Tensor:
        weight = self.state[f"{name}.weight"]
        options.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        groups = (32, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        return F.group_norm(x, *groups, eps=1e-6)

    def block(self, x: Tensor, name: str) -> Tensor:
        h = x
        for number in (1, 2):
            h = self.norm(h, f"{name}.norm{number}")
            h = self.conv(h * torch.sigmoid(h), f"{name}.conv{number}")
        return h + (self.conv(x, f"{name}.nin_shortcut") if x.shape != h.shape else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def middle(self, x: Tensor, side: str) -> Tensor:
        x = self.block(x, f"{side}.mid.{self.mid[0]}")
        x = self.attention(x, f"{side}.mid.{self.mid[1]}")
        return self.block(x, f"{side}.mid.{self.mid[2]}")

    def out(self, x: Tensor, side: str) -> Tensor:
        x = self.norm(x, f"{side}.norm_out")
        return self.conv(x * torch.sigmoid(x), f"{side}.conv_out")

    def encodings(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, h, w, D), before the lookup."""
        x = self.conv(x, "encoder.conv_in")
        for level in range(self.last + 1):
            name = f"encoder.{'down' if self.taming else 'conv_blocks'}.{level}"
            for number in range(BLOCKS):
                x = self.block(x, f"{name}.{self.inner}.{number}")
                if level == self.last:
                    x = self.attention(x, f"{name}.attn.{number}")
            if level < self.last:
                padded = F.pad(x, (0, 1, 0, 1))
                x = self.conv(padded, f"{name}.downsample.conv", stride=2, padding=0)
        x = self.conv(self.out(self.middle(x, "encoder"), "encoder"), "quant_conv")
        return x.permute(0, 2, 3, 1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.encodings(x)
        if self.project == "gumbel":
            return self.conv(x.permute(0, 3, 1, 2), "quantize.proj").argmax(dim=1)
        codes = self.state["quantize.embedding.weight"]
        if self.project == "llamagen":
            x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
        return (x[..., None, :] - codes).square().sum(dim=-1).argmin(dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        table = "quantize.embed.weight" if self.project == "gumbel" else "quantize.embedding.weight"
        codes = self.state[table]
        if self.project == "llamagen":
            codes = F.normalize(codes, dim=-1)
        x = self.conv(codes[indices].permute(0, 3, 1, 2), "post_quant_conv")
        x = self.middle(self.conv(x, "decoder.conv_in"), "decoder")
        for level in reversed(range(self.last + 1)):
            place = f"up.{level}" if self.taming else f"conv_blocks.{self.last - level}"
            for number in range(BLOCKS + 1):
                x = self.block(x, f"decoder.{place}.{self.inner}.{number}")
                if level == self.last:
                    x = self.attention(x, f"decoder.{place}.attn.{number}")
            if level > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(x, f"decoder.{place}.upsample.conv")
        return self.out(x, "decoder")
