"""Tiny random models of images, and of images and text: ViT, DeiT, CLIP, SigLIP, SigLIP 2. Masks, references and
comparisons are those of `tiny_models`.

Towers differ in depth, width, heads and FFN; weights, biases, norms and embeddings are random.
"""

import torch
import transformers
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
)

VOCAB, BOS, EOS, PAD, TOKENS = 60, 57, 58, 59, 20
TEXT = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 56, "num_hidden_layers": 2}
IMAGE = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 72, "num_hidden_layers": 3}
SIZE, PATCH, CHANNELS = 12, 4, 3
PROJECTED = 24

# Class: config, what it reads ("text", "image" or both, "patches" for images as SigLIP 2 takes them), what is compared.
MODELS = {
    "ViTModel": (ViTConfig, "image", ("last_hidden_state", "pooler_output")),
    "ViTForImageClassification": (ViTConfig, "image", ("logits",)),
    "ViTForMaskedImageModeling": (ViTConfig, "image", ("reconstruction",)),
    "DeiTModel": (DeiTConfig, "image", ("last_hidden_state", "pooler_output")),
    "DeiTForImageClassification": (DeiTConfig, "image", ("logits",)),
    "DeiTForImageClassificationWithTeacher": (DeiTConfig, "image", ("logits", "distillation_logits")),
    "DeiTForMaskedImageModeling": (DeiTConfig, "image", ("reconstruction",)),
    "CLIPTextModel": (CLIPTextConfig, "text", ("last_hidden_state", "pooler_output")),
    "CLIPTextModelWithProjection": (CLIPTextConfig, "text", ("text_embeds",)),
    "CLIPVisionModel": (CLIPVisionConfig, "image", ("last_hidden_state", "pooler_output")),
    "CLIPVisionModelWithProjection": (CLIPVisionConfig, "image", ("image_embeds",)),
    "CLIPForImageClassification": (CLIPConfig, "image", ("logits",)),
    "CLIPModel": (CLIPConfig, "text image", ("logits_per_image", "text_embeds", "image_embeds")),
    "SiglipTextModel": (SiglipTextConfig, "text", ("last_hidden_state", "pooler_output")),
    "SiglipVisionModel": (SiglipVisionConfig, "image", ("last_hidden_state", "pooler_output")),
    "SiglipForImageClassification": (SiglipConfig, "image", ("logits",)),
    "SiglipModel": (SiglipConfig, "text image", ("logits_per_image", "text_embeds", "image_embeds")),
    "Siglip2TextModel": (Siglip2TextConfig, "text", ("last_hidden_state", "pooler_output")),
    "Siglip2VisionModel": (Siglip2VisionConfig, "patches", ("last_hidden_state", "pooler_output")),
    "Siglip2Model": (Siglip2Config, "text patches", ("logits_per_image", "text_embeds", "image_embeds")),
}


def config(name, **changes):
    """changes: of the config, and `text` and `image`, those of the towers."""
    cls, text, image = MODELS[name][0], TEXT | changes.pop("text", {}), IMAGE | changes.pop("image", {})
    text |= {"vocab_size": VOCAB, "max_position_embeddings": TOKENS, "pad_token_id": PAD, "bos_token_id": BOS}
    text |= {"eos_token_id": EOS, "projection_dim": PROJECTED, "projection_size": IMAGE["hidden_size"]}
    image |= {"patch_size": PATCH, "num_channels": CHANNELS, "projection_dim": PROJECTED}
    image |= {"num_patches": (SIZE // PATCH) ** 2} if "Siglip2" in name else {"image_size": SIZE}
    if cls in (ViTConfig, DeiTConfig):
        return cls(**image | {"encoder_stride": PATCH, "num_labels": 3} | changes)
    if "Text" in cls.__name__:
        return cls(**text | changes)
    if "Vision" in cls.__name__:
        return cls(**image | changes)
    return cls(text_config=text, vision_config=image, num_labels=3, projection_dim=PROJECTED, **changes)


def build(name, attention="sdpa", dtype=torch.float32, seed=0, **changes):
    """A dense model in eval mode."""
    cls = getattr(transformers, name)
    model = cls._from_config(config(name, **changes), attn_implementation=attention)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in part and p.dim() == 1:
                p.copy_(1 + 0.3 * noise if part.endswith("weight") else 0.3 * noise)
            elif p.dim() >= 2 and "embedding" not in part:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.5 * noise)
    return model.to(dtype).eval()


def batch(name, size=3, length=9, padded=True, seed=0, dtype=torch.float32):
    """What the model is called with. padded: texts of different lengths, the first one full, and images of different
    numbers of patches, where the model takes such.
    """
    g, reads, inputs = torch.Generator().manual_seed(seed), MODELS[name][1].split(), {}
    if "text" in reads:
        ids = torch.randint(3, BOS, (size, length), generator=g)
        mask = torch.ones_like(ids)
        for row in range(size):
            end = length - (row % (length - 2) if padded else 0)
            ids[row, end - 1], ids[row, end:], mask[row, end:] = EOS, PAD, 0
        inputs |= {"input_ids": ids, "attention_mask": mask}
    if "image" in reads:
        inputs["pixel_values"] = torch.randn(size, CHANNELS, SIZE, SIZE, generator=g).to(dtype)
    if "patches" in reads:
        side = SIZE // PATCH
        pixels = torch.randn(size, side**2, CHANNELS * PATCH**2, generator=g)
        mask = torch.ones(size, side**2, dtype=torch.int64)
        shapes = torch.full((size, 2), side)
        if padded and size > 1:
            mask[1, side * 2 :], shapes[1, 0] = 0, 2
        inputs |= {"pixel_values": pixels.to(dtype), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return inputs


@torch.no_grad()
def outputs(model, inputs):
    """What the model is compared by, flat. Hidden states of padding are left out: nothing reads them."""
    out, parts = model(**inputs), []
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    for key in MODELS[type(model).__name__][2]:
        value = out[key]
        if key == "last_hidden_state" and mask is not None:
            value = value[mask.bool()]
        parts.append((value / value.abs().max()).flatten())
    return torch.cat(parts)


def names(model_name, tower="image", layer=0):
    """Module names of the six linears of a block, written out: {"q": ..., "k", "v", "o", "up", "down"}."""
    if model_name.startswith(("ViT", "DeiT")):
        prefix = "" if model_name.endswith("Model") else f"{model_name[:4].rstrip('F').lower()}."
        block, attention, o = f"{prefix}layers.{layer}.", "attention", "o_proj"
    else:
        inside = {"text": "text_model.", "image": "vision_model."}[tower]
        alone = model_name.endswith(("TextModel", "VisionModel"))
        block, attention, o = f"{'' if alone else inside}encoder.layers.{layer}.", "self_attn", "out_proj"
    found = {part: f"{block}{attention}.{part}_proj" for part in "qkv"}
    return found | {"o": f"{block}{attention}.{o}", "up": f"{block}mlp.fc1", "down": f"{block}mlp.fc2"}
