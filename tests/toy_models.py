"""Makers of the toy worlds' tiny models: a Qwen3-VL judge, a FLUX and a Wan generator, real classes built from configs, from nothing."""
import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (ConfigMixin, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, ModelMixin, WanPipeline,
                       WanTransformer3DModel)
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration, Qwen3VLProcessor)

import toy_video as V
import toy_world as W
from reward import without_video

PATCH, MERGE = 8, 2                                  # one visual token covers a 16 x 16 cell: an image is 9 tokens, a clip 3 x 9
INSTRUCTION = "Compare the images for: {prompt}"     # a tiny judge reads a short one; "videos" of clips
SPECIAL = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
           "vision_end_token": "<|vision_end|>"}
PIECES = (r"""[\]},{\["]*"(?:categories":\[\{"name":"[^"]*","dims":\[\{"|name":"[A-D]\.[^"]*","dims":\[\{")?name":"(?:the\b|[^".]*","reason_1":")|"""
          r"""[\]},{\["]*"[a-z_0-9]+":"?|, (?:correct|partial|wrong)|: (?:looks|content) decides?|(?:Image|Video) \d|"""
          r""" leads on (?:the\b|[A-Z][a-z]+(?: [a-z]+)?)| ?[A-Za-z]+| ?\d|[^\sA-Za-z\d]+|\s+""")   # a rubric's line begins with one token
CHAT = """{%- set n = namespace(images=0) -%}{%- for m in messages -%}<|im_start|>{{ m['role'] + '\\n' }}{%- if m['content'] is string -%}
{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}{{ 'MEDIUM ' ~ (n.images // FRAMES + 1) }}{%- if FRAMES > 1 -%}{{ ' ' ~ (n.images % FRAMES + 1) }}{%- endif -%}
{%- set n.images = n.images + 1 -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ c['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def make_judge_tokenizer(vocab_size=768, num_texts=2000, world=W):
    """A byte-level BPE trained on the teacher's traces; pieces such as `","score_1":` become single tokens."""
    corpus = [r[k] for r in world.Records("train", "trace", num_texts) for k in ("response", "prompt")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus += [INSTRUCTION.replace("image", world.MEDIUM.lower()), "user\n", "assistant"] * num_texts      # words of every prompt become single tokens
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL.values()]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        padding_side="left", extra_special_tokens=SPECIAL)
    tokenizer.chat_template = CHAT.replace("FRAMES", str(world.FRAMES)).replace("MEDIUM", world.MEDIUM)
    return tokenizer


def make_judge(seed=0, width=128, layers=4, vision_width=96, vision_layers=2, world=W):
    """(model, processor): a Qwen3-VL of 1.6M parameters with random weights, for a world's images or clips.

    Larger initial weights (std .06, position embeddings x 8), DeepStack and an input scaling that puts the plain ground near 0
    are what lets it learn to see within minutes.
    """
    torch.manual_seed(seed)
    tokenizer = make_judge_tokenizer(world=world)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    half = width // 8                                # of a head's width; rotary channels for time, height and width
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4, max_position_embeddings=1024,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_interleaved=True,
                                              mrope_section=[half - 2 * (half // 4), half // 4, half // 4]),
                         pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, initializer_range=.06),
        vision_config=dict(depth=vision_layers, hidden_size=vision_width, intermediate_size=3 * vision_width, num_heads=3,
                           patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=1, out_hidden_size=width,
                           num_position_embeddings=(world.SIZE // PATCH) ** 2, deepstack_visual_indexes=[0], initializer_range=.06),
        image_token_id=ids["image_token"], video_token_id=ids["video_token"], vision_start_token_id=ids["vision_start_token"],
        vision_end_token_id=ids["vision_end_token"], tie_word_embeddings=True)
    config.initializer_range = .06
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.no_grad():
        model.model.visual.pos_embed.weight.mul_(8)
    pixels = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, image_mean=[.85] * 3,
                                      image_std=[.25] * 3, size=dict(shortest_edge=world.SIZE ** 2, longest_edge=world.SIZE ** 2))
    return model, without_video(Qwen3VLProcessor)(pixels, tokenizer, chat_template=tokenizer.chat_template)


# ---------------------------------------------------------------- the generator

class PatchCodec(ModelMixin, ConfigMixin):
    """Stands in for the VAE: a whitened PCA of 16 x 16 patches. A patch's 32 numbers lie as (8, 2, 2), so FLUX packs them into a token."""

    @register_to_config
    def __init__(self, latent_channels=8, block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, shift_factor=0.0):
        super().__init__()
        k = 4 * latent_channels
        self.mean, self.basis, self.scale = (torch.nn.Parameter(torch.zeros(shape), False) for shape in ((768,), (k, 768), (k,)))

    def fit(self, images):
        """Principal components of the patches of images (B, 3, H, W) in [-1, 1], half whitened, latents of unit variance."""
        x = F.unfold(images, 16, stride=16).mT.reshape(-1, 768)
        self.mean.data = x.mean(0)
        variances, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))            # ascending
        k = len(self.basis)
        self.basis.data, self.scale.data = vectors.flip(1)[:, :k].T.contiguous(), variances.flip(0)[:k] ** .25
        self.scale.data *= self.encode(images).latent_dist.mode().std()
        return self

    def encode(self, images):
        """.latent_dist of (B, 8, 6, 6) for images (B, 3, 48, 48); its sample() and mode() are the same."""
        z = (F.unfold(images, 16, stride=16).mT - self.mean) @ self.basis.T / self.scale                # (B, 9, 32)
        z = F.pixel_shuffle(z.mT.unflatten(2, (images.shape[2] // 16, images.shape[3] // 16)), 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: z, mode=lambda: z))

    def decode(self, z, return_dict=True):
        """Images (B, 3, 48, 48), about in [-1, 1], of latents (B, 8, 6, 6)."""
        z = F.pixel_unshuffle(z, 2)                                                                     # (B, 32, 3, 3)
        x = (z.flatten(2).mT * self.scale) @ self.basis + self.mean                                     # (B, 9, 768)
        x = F.fold(x.mT, (16 * z.shape[2], 16 * z.shape[3]), 16, stride=16)
        return SimpleNamespace(sample=x) if return_dict else (x,)


MAX_WORDS = 12
PIPE_ARGS = dict(height=48, width=48, max_sequence_length=MAX_WORDS, num_inference_steps=10)


WORD, WORDS = r"moves \w+|\S+", " ".join([*W.SHAPES, *(s + "s" for s in W.SHAPES), *W.COLORS, *W.NUMBERS, *W.RELATIONS.values()])


def make_word_tokenizer(words=WORDS):
    """One token a word, or a movement ("moves left"), <eos> at the end."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *sorted({"a", "and", *re.findall(WORD, words)})])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   model_max_length=MAX_WORDS)


def make_text_encoder(vocab_size, layers, width=64):
    """A random CLIPTextModel, frozen as text encoders are: orthogonal words and positions, so that both can be read off its output."""
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=MAX_WORDS, pad_token_id=0, bos_token_id=2, eos_token_id=1, projection_dim=width))
    basis = torch.linalg.qr(torch.randn(width, width))[0] * width ** .5
    for name, p in encoder.named_parameters():
        if "embedding" in name:
            p.data = (basis[:vocab_size] if "token" in name else basis[-MAX_WORDS:]).clone()
        elif p.ndim == 2:
            torch.nn.init.orthogonal_(p)
    return encoder.requires_grad_(False).eval()


def make_generator(seed=0, width=128, images=3000):
    """A FluxPipeline of 1.8M parameters with random weights: stock parts but for the codec, which is fitted to rendered images."""
    torch.manual_seed(seed)
    tokenizer, records = make_word_tokenizer(), W.Records("train", "image", images, seed)
    pixels = np.stack([np.asarray(records[i]["images"][0]) for i in range(images)])
    codec = PatchCodec().fit(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=width // 4, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12))
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    encoders = [make_text_encoder(len(tokenizer), layers) for layers in (1, 0)]
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=codec, text_encoder=encoders[0], tokenizer=tokenizer,
                        text_encoder_2=encoders[1], tokenizer_2=tokenizer, transformer=transformer)


# ---------------------------------------------------------------- the generator of clips

class ClipCodec(ModelMixin, ConfigMixin):
    """Stands in for Wan's VAE: PatchCodec frame by frame. A patch's 32 numbers lie as (8, 2, 2), which Wan's transformer makes one token."""

    @register_to_config
    def __init__(self, z_dim=8, scale_factor_temporal=1, scale_factor_spatial=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8):
        super().__init__()
        self.frame = PatchCodec(z_dim)

    def encode(self, frames):
        """PatchCodec's: .latent_dist of (B F, 8, 6, 6) for frames (B F, 3, 48, 48)."""
        return self.frame.encode(frames)

    def decode(self, z, return_dict=True):
        """Clips (B, 3, F, 48, 48), about in [-1, 1], of latents (B, 8, F, 6, 6)."""
        x = rearrange(self.frame.decode(rearrange(z, "b c f h w -> (b f) c h w")).sample, "(b f) c h w -> b c f h w", b=len(z))
        return SimpleNamespace(sample=x) if return_dict else (x,)


CLIP_ARGS = dict(height=V.SIZE, width=V.SIZE, num_frames=V.FRAMES - 1, guidance_scale=1.0, max_sequence_length=MAX_WORDS, num_inference_steps=10)
# Wan rounds the number of frames to 1 + scale_factor_temporal k and, where that factor is 1, ends up with one more than it is asked for


def make_clip_generator(seed=0, width=128, layers=4, clips=3000):
    """A WanPipeline of 1.3M parameters with random weights: stock parts but for the codec, which is fitted to rendered clips."""
    torch.manual_seed(seed)
    tokenizer, records = make_word_tokenizer(" ".join([*V.SHAPES, *V.COLORS, *V.MOTIONS])), V.Records("train", "image", clips, seed)
    pixels = np.concatenate([np.stack(records[i]["videos"][0]) for i in range(clips)])                  # (B F, H, W, 3)
    codec = ClipCodec()
    codec.frame.fit(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=width // 4, in_channels=8, out_channels=8, text_dim=64, freq_dim=width,
        ffn_dim=4 * width, num_layers=layers, rope_max_seq_len=32)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return WanPipeline(tokenizer=tokenizer, text_encoder=make_text_encoder(len(tokenizer), 0), vae=codec, scheduler=FlowMatchEulerDiscreteScheduler(),
                       transformer=transformer)


GENERATORS = {"image": make_generator, "video": make_clip_generator}
CALLS = {"FluxPipeline": PIPE_ARGS, "WanPipeline": CLIP_ARGS}                # the arguments of their calls
