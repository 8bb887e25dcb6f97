"""Tiny random models in float64 of every family, from their own configs, and batches in each family's own layout.

Every family reads the same words: the sequence is made of word ids below `WORDS` and of the special ids below, and images are
noise. What differs is what an image becomes: how many visual tokens, what stands around them, and which inputs go with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import Tensor

from tests import tiny
from tests.tiny import Composition, Turn, candidates

__all__ = ["COMPOSITIONS", "FAMILIES", "candidates"]

WORDS, VISION_START, VISION_END, END, PAD, IMAGE, VIDEO, VOCABULARY = 30, 40, 41, 38, 37, 39, 42, 48


@dataclass(frozen=True)
class Ids:
    """What a model's config has to know of its tokenizer."""

    image: int = IMAGE
    start: int = VISION_START
    stop: int = VISION_END
    video: int = VIDEO
    eos: int = END
    pad: int = PAD
    vocabulary: int = VOCABULARY


IDS = Ids()


COMPOSITIONS: dict[str, Composition] = {**tiny.COMPOSITIONS, "alone": ((Turn(1, 3, 4), Turn(1, 2, 3)),)}

Picture = tuple[list[int], dict[str, Tensor]]
"""The tokens of one image, and what the model reads for it."""


def text_sizes(hidden: int, layers: int, ids: Ids, **more: object) -> dict[str, object]:
    """What every language model's config takes."""
    return {
        "vocab_size": ids.vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "bos_token_id": None,
        **more,
    }


def siglip(**more: object) -> hf.SiglipVisionConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.SiglipVisionConfig(**{**sizes, "image_size": 8, "patch_size": 4, **more})


def clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )


def finished(model: hf.PreTrainedModel, attention: str, ids: Ids) -> hf.PreTrainedModel:
    """In float64 and eval mode, with weights large enough that distributions differ clearly from uniform.

    Gemma multiplies embeddings by the root of the hidden size, so that large ones would only name the last token again.
    """
    spread = 0.1 if "gemma" in model.get_decoder().config.model_type else 0.6
    model = model.double().eval()
    model.generation_config = hf.GenerationConfig(eos_token_id=ids.eos, pad_token_id=ids.pad)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "image_newline" in name:
                parameter.normal_(std=spread if "embed_tokens" in name or "lm_head" in name else 0.25)
    model.set_attn_implementation(attention)
    return model


def noise(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


# --- images -----------------------------------------------------------------------------------------------------


def fixed_picture(tokens: int, size: int = 8, around: tuple[list[int], list[int]] = ([], [])) -> Callable:
    """An image of a fixed size, as LLaVA, InternVL and Gemma 3 read it."""

    def draw(random: torch.Generator) -> Picture:
        return around[0] + [IMAGE] * tokens + around[1], {"pixel_values": noise(random, 1, 3, size, size)}

    return draw


def grid_picture(patch: int = 2, merge: int = 2, around: tuple[list[int], list[int]] = ([VISION_START], [VISION_END])):
    """An image of any size as flat patches, as the Qwen VL models read it: here 2 to 6 tokens."""

    def draw(random: torch.Generator) -> Picture:
        height, width = (2 * int(n) for n in torch.randint(1, 4, (2,), generator=random))
        patches = noise(random, height * width, 3 * 2 * patch * patch)
        tokens = height * width // merge**2
        inputs = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}
        return around[0] + [IMAGE] * tokens + around[1], inputs

    return draw


def anyres_picture(random: torch.Generator) -> Picture:
    """An image of any shape as LLaVA-OneVision reads it: a small view of the whole, tiles, and a new-line token a row."""
    wide = bool(torch.randint(0, 2, (1,), generator=random))
    size, tiles = ((8, 16), 3) if wide else ((8, 8), 2)
    # 4 tokens of the whole; the tiles' grid is 2 rows of 4 or 2 columns, each row with a new line.
    tokens = 4 + 2 * (4 + 1) if wide else 4 + 2 * (2 + 1)
    return [IMAGE] * tokens, {"pixel_values": noise(random, 1, tiles, 3, 8, 8), "image_sizes": torch.tensor([size])}


def anyres_tokens(picture: dict[str, Tensor]) -> int:
    return 4 + 2 * (2 * (picture["pixel_values"].shape[1] - 1) + 1)


def split_tokens(picture: dict[str, Tensor]) -> int:
    return 4 * len(picture["pixel_values"])


def split_picture(random: torch.Generator) -> Picture:
    """An image as SmolVLM reads it: one or two tiles, each between tokens of their own."""
    tiles = int(torch.randint(1, 3, (1,), generator=random))
    one = [VISION_START, *[IMAGE] * 4, VISION_END]
    return one * tiles, {"pixel_values": noise(random, tiles, 3, 8, 8)}


# --- joining samples ----------------------------------------------------------------------------------------------


def joined_pictures(pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """All images of the batch behind each other."""
    flat = [picture for sample in pictures for picture in sample]
    return {name: torch.cat([picture[name] for picture in flat]) for name in (flat[0] if flat else ())}


def joined_tiles(pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """LLaVA-OneVision: images padded to the most tiles, and the number of images of each sample."""
    flat = [picture for sample in pictures for picture in sample]
    if not flat:
        return {}
    # Several images in one sample are read without tiles: the small view of the whole alone.
    most = max(picture["pixel_values"].shape[1] for picture in flat)
    pad = [
        torch.nn.functional.pad(p["pixel_values"], (0, 0) * 3 + (0, most - p["pixel_values"].shape[1])) for p in flat
    ]
    return {"pixel_values": torch.cat(pad), "image_sizes": torch.cat([picture["image_sizes"] for picture in flat])}


def joined_by_sample(pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Idefics3 and SmolVLM: one row of tiles for each sample, filled with zeros."""
    rows = [
        torch.cat([p["pixel_values"] for p in sample]) if sample else torch.zeros(0, 3, 8, 8) for sample in pictures
    ]
    most = max(len(row) for row in rows)
    if most == 0:
        return {}
    return {
        "pixel_values": torch.stack(
            [torch.nn.functional.pad(r.double(), (0, 0) * 3 + (0, most - len(r))) for r in rows]
        )
    }


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of a family, and what an image is to it."""

    build: Callable[[int, int, Ids], hf.PreTrainedModel]
    picture: Callable[[torch.Generator], Picture]
    join: Callable[[list[list[dict[str, Tensor]]]], dict[str, Tensor]] = joined_pictures
    token_types: str = ""
    """The name of the input that marks image tokens, if the family has one."""
    marks: Callable[[Tensor, Tensor], Tensor] = lambda ids, roles: (ids == IMAGE).long()
    """What that input holds, from ids and roles."""
    compositions: tuple[str, ...] = tuple(tiny.COMPOSITIONS)
    """What the family is made for."""
    prefix: list[int] = field(default_factory=list)
    count: Callable[[dict[str, Tensor]], int] = lambda picture: 4
    attention: str = "sdpa"
    """What the family runs on in these tests: Gemma 2 caps its attention, which SDPA does not know."""

    def model(self, seed: int, hidden: int = 32, layers: int = 2, ids: Ids = IDS) -> hf.PreTrainedModel:
        torch.manual_seed(seed)
        return finished(self.build(hidden, layers, ids), self.attention, ids)

    def visual_tokens(self, picture: dict[str, Tensor]) -> int:
        """Visual tokens of one image."""
        return self.count(picture)

    def pictures(self, composition: Composition, seed: int = 0) -> list[list[dict[str, Tensor]]]:
        """The images of each sample of the batch with that seed."""
        return [pictures for _, _, pictures in self.samples(composition, seed)]

    def samples(
        self, composition: Composition, seed: int
    ) -> list[tuple[list[int], list[int], list[dict[str, Tensor]]]]:
        """Ids, roles and images of each sample. Words depend on the seed alone, whatever an image is to the family."""
        words, noises = (torch.Generator().manual_seed(number) for number in (seed, 1000 + seed))
        return [self.sample(turns, words, noises) for turns in composition]

    def batch(self, composition: Composition, seed: int = 0, side: str = "right") -> dict[str, Tensor]:
        """The batch with random words and images, padded on the given side."""
        samples = self.samples(composition, seed)
        length = max(len(ids) for ids, _, _ in samples)
        out: dict[str, list[list[int]]] = {"input_ids": [], "roles": [], "attention_mask": []}
        for ids, roles, _ in samples:
            room = length - len(ids)
            for name, values, fill in (
                ("input_ids", ids, PAD),
                ("roles", roles, 0),
                ("attention_mask", [1] * len(ids), 0),
            ):
                out[name].append([fill] * room + values if side == "left" else values + [fill] * room)
        tensors = {name: torch.tensor(values) for name, values in out.items()}
        tensors["labels"] = torch.where(tensors["roles"] == 3, tensors["input_ids"], -100)
        if self.token_types:
            tensors[self.token_types] = self.marks(tensors["input_ids"], tensors["roles"])
        return {**tensors, **self.join([pictures for _, _, pictures in samples])}

    def sample(
        self, turns: tuple[Turn, ...], random: torch.Generator, noises: torch.Generator
    ) -> tuple[list[int], list[int], list[dict[str, Tensor]]]:
        """Ids, roles and images of one sample."""
        words = lambda count: torch.randint(0, WORDS, (count,), generator=random).tolist()  # noqa: E731
        ids, roles, pictures = [*self.prefix, *words(1)], [0] * (len(self.prefix) + 1), []
        for turn in turns:
            parts = [(words(turn.instruction), [2] * turn.instruction)]
            for _ in range(turn.images):
                tokens, inputs = self.picture(noises)
                pictures.append(inputs)
                tokens = [*tokens, *words(1)]
                parts.insert(
                    len(parts) if turn.image_last else len(parts) - 1, (tokens, [int(t == IMAGE) for t in tokens])
                )
            for tokens, kinds in parts:
                ids, roles = ids + tokens, roles + kinds
            ids, roles = ids + words(1), roles + [0]
            ids, roles = ids + words(turn.response) + [END], roles + [3] * (turn.response + 1)
        return ids, roles, pictures


# --- families -----------------------------------------------------------------------------------------------------


def llava(vision: Callable, text: type, tied: bool, **more: object) -> Callable[[int, int, Ids], hf.PreTrainedModel]:
    def build(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
        sizes = text_sizes(hidden, layers, ids, tie_word_embeddings=tied, **more)
        config = hf.LlavaConfig(
            vision_config=vision(),
            text_config=text(**sizes),
            image_token_index=ids.image,
            vision_feature_select_strategy="default" if vision is clip else "full",
            vision_feature_layer=-2,
            image_seq_length=4,
            tie_word_embeddings=tied,
        )
        return hf.LlavaForConditionalGeneration(config)

    return build


def llava_onevision(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=siglip(vision_use_head=False),
            text_config=hf.Qwen2Config(**text_sizes(hidden, layers, ids)),
            image_token_index=ids.image,
            video_token_index=ids.video,
            image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]],
            vision_feature_layer=-1,
            image_seq_length=4,
        )
    )


def grid_tokens(picture: dict[str, Tensor]) -> int:
    return int(picture["image_grid_thw"].prod()) // 4


def qwen_tokens(ids: Ids) -> dict[str, int]:
    return {
        "image_token_id": ids.image,
        "video_token_id": ids.video,
        "vision_start_token_id": ids.start,
        "vision_end_token_id": ids.stop,
    }


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": hidden, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2}
    sizes = text_sizes(hidden, layers, ids, rope_parameters=MROPE, tie_word_embeddings=True)
    config = hf.Qwen2VLConfig(text_config=sizes, vision_config=vision, tie_word_embeddings=True, **qwen_tokens(ids))
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": hidden, "num_heads": 2, "patch_size": 2,
        "window_size": 8, "fullatt_block_indexes": [1],
    }  # fmt: skip
    sizes = text_sizes(hidden, layers, ids, rope_parameters=MROPE)
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=sizes, vision_config=vision, **qwen_tokens(ids))
    )


def qwen3_vl(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": hidden, "num_heads": 2, "patch_size": 2,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
    }  # fmt: skip
    sizes = text_sizes(hidden, layers, ids, rope_parameters={**MROPE, "mrope_interleaved": True})
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=sizes, vision_config=vision, **qwen_tokens(ids))
    )


def qwen3_5(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": hidden, "num_heads": 2, "patch_size": 2,
        "num_position_embeddings": 16,
    }  # fmt: skip
    sizes = text_sizes(
        hidden,
        layers + 2,
        ids,
        layer_types=["linear_attention", "full_attention"] * ((layers + 2) // 2) + ["full_attention"] * (layers % 2),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    )
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=sizes, vision_config=vision, **qwen_tokens(ids))
    )


def smolvlm(config: type, model: type) -> Callable[[int, int, Ids], hf.PreTrainedModel]:
    def build(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
        vision = {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
            "patch_size": 2,
        }  # fmt: skip
        text = hf.LlamaConfig(**text_sizes(hidden, layers, ids))
        return model(
            config(
                vision_config=vision, text_config=text, image_token_id=ids.image, scale_factor=2, pad_token_id=ids.pad
            )
        )

    return build


def internvl(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    vision = hf.InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[8, 8],
        patch_size=[2, 2],
    )
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=vision,
            text_config=hf.Qwen2Config(**text_sizes(hidden, layers, ids)),
            image_token_id=ids.image,
            image_seq_length=4,
        )
    )


def gemma3(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    sizes = text_sizes(
        hidden,
        layers + 1,
        ids,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"][: layers + 1],
        query_pre_attn_scalar=8,
        final_logit_softcapping=30.0,
    )
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=siglip(patch_size=2, vision_use_head=False),
            text_config=hf.Gemma3TextConfig(**sizes),
            image_token_index=ids.image,
            image_token_id=ids.image,
            mm_tokens_per_image=4,
            boi_token_index=ids.start,
            eoi_token_index=ids.stop,
        )
    )


def paligemma(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    """A prefix language model: everything before the response sees all of it; and a cap on its logits."""
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=siglip(vision_use_head=False, projection_dim=hidden),
            text_config=hf.GemmaConfig(**text_sizes(hidden, layers, ids, final_logit_softcapping=5.0)),
            image_token_index=ids.image,
            image_token_id=ids.image,
            projection_dim=hidden,
            hidden_size=hidden,
        )
    )


def gemma4(hidden: int, layers: int, ids: Ids) -> hf.PreTrainedModel:
    """Image tokens see ahead by marks of another name than Gemma 3's; logits are capped."""
    sizes = text_sizes(
        hidden,
        layers + 1,
        ids,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"][: layers + 1],
        use_bidirectional_attention="vision",
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=ids.vocabulary,
        final_logit_softcapping=20.0,
        global_head_dim=8,
    )
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(
        hf.Gemma4Config(
            text_config=sizes,
            vision_config=vision,
            audio_config=None,
            image_token_id=ids.image,
            video_token_id=ids.video,
            boi_token_id=ids.start,
            eoi_token_id=ids.stop,
        )
    )


def placed_picture(random: torch.Generator) -> Picture:
    """An image as patches with their places, as Gemma 4 reads it: 4 x 4 patches pooled to 4 tokens."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).view(1, 16, 2)
    inputs = {"pixel_values": noise(random, 1, 16, 12), "image_position_ids": places}
    return [VISION_START, *[IMAGE] * 4, VISION_END], inputs


FAMILIES: dict[str, Family] = {
    "llava-siglip-qwen3": Family(llava(siglip, hf.Qwen3Config, tied=True), fixed_picture(4)),
    "llava-clip-llama": Family(llava(clip, hf.LlamaConfig, tied=False), fixed_picture(4)),
    "llava-siglip-qwen2": Family(llava(siglip, hf.Qwen2Config, tied=True), fixed_picture(4)),
    "llava-siglip-mistral": Family(llava(siglip, hf.MistralConfig, tied=False, sliding_window=5), fixed_picture(4)),
    "llava-siglip-granite": Family(
        llava(siglip, hf.GraniteConfig, tied=True, logits_scaling=2.5, embedding_multiplier=1.5), fixed_picture(4)
    ),
    "llava-siglip-gemma2": Family(
        llava(
            siglip,
            hf.Gemma2Config,
            tied=True,
            sliding_window=5,
            final_logit_softcapping=5.0,
            attn_logit_softcapping=3.0,
        ),
        fixed_picture(4),
        attention="eager",
        # Without padding: eager attention turns a padding row that sees nothing into a NaN in float64 models.
        compositions=("alone",),
    ),
    "llava-onevision": Family(llava_onevision, anyres_picture, joined_tiles, count=anyres_tokens),
    "qwen2-vl": Family(qwen2_vl, grid_picture(), token_types="mm_token_type_ids", count=grid_tokens),
    "qwen2.5-vl": Family(qwen2_5_vl, grid_picture(), token_types="mm_token_type_ids", count=grid_tokens),
    "qwen3-vl": Family(qwen3_vl, grid_picture(), token_types="mm_token_type_ids", count=grid_tokens),
    "qwen3.5": Family(qwen3_5, grid_picture(), token_types="mm_token_type_ids", count=grid_tokens),
    "smolvlm": Family(
        smolvlm(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration),
        split_picture,
        joined_by_sample,
        count=split_tokens,
    ),
    "idefics3": Family(
        smolvlm(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration),
        split_picture,
        joined_by_sample,
        count=split_tokens,
    ),
    "internvl": Family(internvl, fixed_picture(4, 8, ([VISION_START], [VISION_END]))),
    "gemma3": Family(
        gemma3, fixed_picture(4, 8, ([VISION_START], [VISION_END])), token_types="token_type_ids", prefix=[2]
    ),
    "gemma4": Family(gemma4, placed_picture, token_types="mm_token_type_ids", prefix=[2]),
    "paligemma": Family(
        paligemma,
        fixed_picture(4),
        token_types="token_type_ids",
        marks=lambda ids, roles: (roles == 3).long(),
        compositions=("one turn", "text only in the batch", "text only"),
    ),
}
