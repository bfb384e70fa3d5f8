"""Makers of the toy worlds' tiny models: a Qwen3-VL judge, a FLUX and a Wan generator, real classes
built from configs, with random weights, and their folders."""
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                       WanPipeline, WanTransformer3DModel)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast,
                          Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration,
                          Qwen3VLProcessor)

import toy_codec
import toy_video as V
import toy_world as W
from reward import leave_out_video

PATCH, MERGE = 8, 2                                  # a visual token covers a 16 x 16 cell: an
                                                     # image is 9 tokens, a clip 3 x 9
INSTRUCTION = "Compare the images for: {prompt}"     # a tiny judge reads a short one
SPECIAL = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
           "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL.values()]
PIECES = "|".join([                                  # of a text, each of them one token
    # a rubric's line up to its first reason, or to the name of an object; before it a winner
    r'''(?:","cat_winner":"(?:Tie|(?:Image|Video) \d))?[\]},{\["]*"'''
    r'''(?:(?:categories":\[\{")?name":"[A-D]\.[^"]*","dims":\[\{")?'''
    r'''name":"(?:the\b|[^".]*","reason_1":")''',
    # its reasons and scores
    r''' ?[a-z]+(?: [a-z]+)?(?:","reason_2":"|(?=","score_1"))| [a-z]+","reason_1":"''',
    r''', (?:correct|partial|wrong)(?:","reason_2":")?''',
    r'''","score_1":\d,"score_2":\d''',
    # winners, and why
    r'''\}\],"cat_reason":"(?:Both are even|(?:Image|Video) \d)''',
    r'''","cat_winner":"(?:Tie|(?:Image|Video) \d)(?:"\}\],"reason":")?''',
    r''' leads on (?:the\b|[A-Za-z ]+)|(?:, )?[A-D] (?:\d|even)''',
    r'''(?:: (?:looks|content) decides?)?","winner":"|(?:Image|Video) \d(?:"\})?''',
    # other keys, words, numbers
    r'''[\]},{\["]*"[a-z_0-9]+":"?|(?:Compare|Rate) the \w+ for: ''',
    r''' ?[A-Za-z]+\n?| ?\d|[^\sA-Za-z\d]+|\s+'''])
CHAT = (
    "{%- set n = namespace(images=0) -%}{%- for m in messages -%}"
    "<|im_start|>{{ m['role'] + '\\n' }}{%- if m['content'] is string -%}\n"
    "{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}"
    "{{ 'MEDIUM ' ~ (n.images // FRAMES + 1) }}"
    "{%- if FRAMES > 1 -%}{{ ' ' ~ (n.images % FRAMES + 1) }}{%- endif -%}\n"
    "{%- set n.images = n.images + 1 -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}\n"
    "{%- endfor -%}{%- endif -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}")


# ------------------------------------------------------------------------------------------------
# the judge

def make_judge_tokenizer(num_texts=2000, world=W):
    """Tokens are bytes and the pieces of what the teacher writes and a judge is asked."""
    pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    records = world.Records("train", "trace", num_texts)
    texts = [instruction(world), "user\n", "assistant\n"]
    for i in range(num_texts):
        prompt, scenes, verdict, _ = records.scenes(i)
        texts += [W.verdict_text(verdict), prompt["text"]]
        if world is W:
            question = W.ask_about(scenes[0], random.Random(i))
            texts += [W.SCORE_INSTRUCTION, W.score_image(prompt, scenes[0]), *question]
    pieces = set(pre_tokenizers.ByteLevel.alphabet())
    for text in texts:
        pieces.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *sorted(pieces)])}
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", extra_special_tokens=SPECIAL)
    chat = CHAT.replace("FRAMES", str(world.FRAMES)).replace("MEDIUM", world.MEDIUM)
    tokenizer.chat_template = chat
    return tokenizer


def instruction(world=W):
    """What a world's judge is asked: "Compare the images for: {prompt}", or the videos."""
    return INSTRUCTION.replace("image", world.MEDIUM.lower())


def make_judge(seed=0, width=128, layers=4, vision_width=96, vision_layers=2, world=W):
    """(model, processor): a Qwen3-VL of 1.5M parameters with random weights, for a world's images
    or clips.

    Larger initial weights (std .06, position embeddings x 8), DeepStack and an input scaling that
    puts the plain ground near 0 are what lets it learn to see within minutes.
    """
    torch.manual_seed(seed)
    tokenizer = make_judge_tokenizer(world=world)
    half = width // 8                                # of a head: channels of time, rows, columns
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
            "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=width // 4, max_position_embeddings=1024, rope_parameters=rope,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, initializer_range=.06)
    vision = dict(
        depth=vision_layers, hidden_size=vision_width, intermediate_size=3 * vision_width,
        num_heads=3, patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=1,
        out_hidden_size=width, num_position_embeddings=(world.SIZE // PATCH) ** 2,
        deepstack_visual_indexes=[0], initializer_range=.06)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    config.initializer_range = .06
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 256
    with torch.no_grad():
        model.model.visual.pos_embed.weight.mul_(8)
    num_pixels = world.SIZE ** 2
    pixels = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, image_mean=[.85] * 3,
        image_std=[.25] * 3, size={"shortest_edge": num_pixels, "longest_edge": num_pixels})
    leave_out_video()
    return model, Qwen3VLProcessor(pixels, tokenizer, chat_template=tokenizer.chat_template)


def save_judge(folder, model, processor, world=W):
    """Write the judge's folder: for from_pretrained, and its instruction in template.txt."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Path(folder, "template.txt").write_text(instruction(world))


# ------------------------------------------------------------------------------------------------
# the generators

MAX_WORDS = 12
PIPE_ARGS = {"height": 48, "width": 48, "max_sequence_length": MAX_WORDS,
             "num_inference_steps": 10}
# Wan rounds the number of frames to 1 + scale_factor_temporal k and, where that factor is 1, ends
# up with one more than it is asked for
CLIP_ARGS = {**PIPE_ARGS, "num_frames": V.FRAMES - 1, "guidance_scale": 1.0}
CALLS = {"FluxPipeline": PIPE_ARGS, "WanPipeline": CLIP_ARGS}
WORD = r"moves \w+|\S+"                              # a movement is one word


def make_word_tokenizer(words):
    """One token a word, <eos> at the end."""
    words = sorted({"a", "and", *re.findall(WORD, " ".join(words))})
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=MAX_WORDS)


def make_text_encoder(vocab_size, layers, width=64):
    """A random CLIPTextModel, frozen as text encoders are: orthogonal words and positions, so that
    both can be read off its output."""
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=MAX_WORDS,
        pad_token_id=0, bos_token_id=2, eos_token_id=1, projection_dim=width))
    basis = torch.linalg.qr(torch.randn(width, width))[0] * width ** .5
    for name, p in encoder.named_parameters():
        if "embedding" in name:
            p.data = (basis[:vocab_size] if "token" in name else basis[-MAX_WORDS:]).clone()
        elif p.ndim == 2:
            nn.init.orthogonal_(p)
    return encoder.requires_grad_(False).eval()


def to_pixels(frames):
    """Images (B, 3, H, W) in [-1, 1] of PIL images."""
    pixels = np.stack([np.asarray(frame) for frame in frames])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_generator(seed=0, width=128, images=3000):
    """A FluxPipeline of 1.8M parameters with random weights: stock parts but for the codec, which
    is fitted to rendered images."""
    torch.manual_seed(seed)
    plurals = [shape + "s" for shape in W.SHAPES]
    words = [*W.SHAPES, *plurals, *W.COLORS, *W.NUMBERS, *W.RELATIONS.values()]
    tokenizer = make_word_tokenizer(words)
    records = W.Records("train", "image", images, seed)
    codec = toy_codec.PatchCodec()
    codec.fit(to_pixels([record["images"][0] for record in records]))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=2,
        attention_head_dim=width // 4, num_attention_heads=4, joint_attention_dim=64,
        pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12))
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    pooled = make_text_encoder(len(tokenizer), 1)
    encoder = make_text_encoder(len(tokenizer), 0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=codec, text_encoder=pooled,
        tokenizer=tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer, transformer=transformer)


def make_clip_generator(seed=0, width=128, layers=4, clips=3000):
    """A WanPipeline of 1.3M parameters with random weights: stock parts but for the codec, which is
    fitted to rendered clips."""
    torch.manual_seed(seed)
    tokenizer = make_word_tokenizer([*V.SHAPES, *V.COLORS, *V.MOTIONS])
    frames = []
    for record in V.Records("train", "image", clips, seed):
        frames += record["videos"][0]
    codec = toy_codec.ClipCodec()
    codec.frame.fit(to_pixels(frames))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=width // 4, in_channels=8,
        out_channels=8, text_dim=64, freq_dim=width, ffn_dim=4 * width, num_layers=layers,
        rope_max_seq_len=32)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    encoder = make_text_encoder(len(tokenizer), 0)
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=codec,
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer)


GENERATORS = {"image": make_generator, "video": make_clip_generator}


def save_generator(folder, pipe):
    """Write the pipeline's folder, the codec's code beside its weights, and the arguments of the
    pipeline's call in pipe_args.json. `DiffusionPipeline.from_pretrained(folder,
    trust_remote_code=True)` loads it without this repository."""
    pipe.save_pretrained(folder)
    shutil.copy(toy_codec.__file__, Path(folder, "vae"))
    call = CALLS[type(pipe).__name__]
    Path(folder, "pipe_args.json").write_text(json.dumps(call, indent=1))
