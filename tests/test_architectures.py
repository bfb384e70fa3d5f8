"""Judges of several families, tiny and random, from their own configs, through SFT and DPO: image and video, SFT of adapters and of all weights."""
import dataclasses
import json

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, decoders

import data
import dpo
import sft
from reward import LocalJudge, leave_out_video
from test_sft import rows

CHAT = """{%- for m in messages -%}<|im_start|>{{ m['role'] + '\n' }}{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}IMAGE
{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"""
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
LLAVA = {"image_token": "<image>", "video_token": "<video>"}
IDEFICS = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=8192)
SIDE = 32                                            # pixels an image is resized to


def make_tokenizer(special):
    """Bytes and the family's special tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special.values()]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(names)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special)


def make(family):
    """(model, processor) of a family."""
    torch.manual_seed(0)
    qwen = family.startswith("Qwen")
    tokenizer = make_tokenizer(QWEN if qwen else {"InternVL": INTERN, "LlavaOnevision": LLAVA, "Idefics3": IDEFICS}[family])
    ids = lambda name: tokenizer.convert_tokens_to_ids(tokenizer.init_kwargs["extra_special_tokens"][name])
    vocab = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    siglip = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8)
    size, stock = dict(height=SIDE, width=SIDE), getattr(hf, f"{'Qwen3VL' if family == 'Qwen3_5' else family}Processor")
    if qwen:
        rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
        text = {**TEXT, **vocab, "rope_parameters": rope, "tie_word_embeddings": False}
        vision = dict(depth=2, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
        vision |= {"Qwen2VL": dict(embed_dim=32, hidden_size=32), "Qwen2_5_VL": dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=32,
                   fullatt_block_indexes=[1])}.get(family, dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=16))
        if family == "Qwen3VL":
            rope["mrope_interleaved"], vision["deepstack_visual_indexes"] = True, [0]
        if family == "Qwen3_5":
            text |= dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                         linear_value_head_dim=8)
            rope.update(mrope_interleaved=True, partial_rotary_factor=1.0)
        config = getattr(hf, f"{family}Config")(
            text_config=text, vision_config=vision, image_token_id=ids("image_token"), video_token_id=ids("video_token"),
            vision_start_token_id=ids("vision_start_token"), vision_end_token_id=ids("vision_end_token"), tie_word_embeddings=False)
        pixels, image = hf.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=dict(shortest_edge=SIDE ** 2, longest_edge=SIDE ** 2)), QWEN
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        options = {}
    elif family == "InternVL":
        config = hf.InternVLConfig(text_config=dict(model_type="qwen2", **TEXT, **vocab), image_token_id=ids("context_image_token"), downsample_ratio=.5,
                                   vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[SIDE] * 2,
                                                      patch_size=[8, 8]))
        pixels, image, options = hf.GotOcr2ImageProcessorPil(size=size, crop_to_patches=False), "<IMG_CONTEXT>", dict(image_seq_length=4)
    elif family == "LlavaOnevision":
        config = hf.LlavaOnevisionConfig(text_config=dict(model_type="qwen2", **TEXT, **vocab), vision_config=dict(model_type="siglip_vision_model", **siglip,
                                         vision_use_head=False), image_token_index=ids("image_token"), video_token_index=ids("video_token"),
                                         image_grid_pinpoints=[[SIDE, SIDE]], vision_feature_layer=-1)
        pixels, image = hf.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[SIDE, SIDE]]), "<image>"
        options = dict(num_image_tokens=16, vision_feature_select_strategy="full")
    else:
        config = hf.Idefics3Config(text_config=dict(model_type="llama", **TEXT, **vocab), vision_config=siglip, image_token_id=ids("image_token"), scale_factor=2)
        pixels = hf.Idefics3ImageProcessorPil(size=dict(longest_edge=SIDE), max_image_size=dict(longest_edge=SIDE), do_image_splitting=False)
        image, options = "<image>", dict(image_seq_len=4)
    leave_out_video()
    processor = stock(image_processor=pixels, tokenizer=tokenizer, chat_template=CHAT.replace("IMAGE", image + "\n"), **options)
    return getattr(hf, f"{family}ForConditionalGeneration")(config), processor


FAMILIES = ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5", "LlavaOnevision", "InternVL", "Idefics3"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    model, processor = make(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(path)
    processor.save_pretrained(path)
    (path / "template.txt").write_text("Compare: {prompt}")
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Trace and preference files of image pairs and of pairs of 8 frames."""
    from PIL import Image
    path = tmp_path_factory.mktemp("records")
    for clip in ("one", "two"):
        (path / clip).mkdir()
        for i in range(8):
            Image.new("RGB", (40, 48), (30 * i, 200, 90 if clip == "one" else 10)).save(path / clip / f"{i}.png")
    for kind, media in (("image", {"images": ["one/1.png", "two/2.png"]}), ("video", {"videos": ["one", "two"]})):
        rest = dict(prompt="a dot", **media)
        lines = [{**rest, "response": f'{{"winner":"Image {1 + i % 2}"}}', "chosen": '{"winner":"Image 1"}', "rejected": f'{{"winner":"Image 2 {"x" * i}"}}'}
                 for i in range(5)]
        (path / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = {"prompt": "a dot", "images": ["one/1.png", "two/2.png"], "winner": "Image 1"}
    (path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return path


@pytest.mark.parametrize("kind, lora", [("image", "4"), ("video", "0")])
def test_sft_and_dpo(folder, records, kind, lora, tmp_path):
    common = ["--model", str(folder), "--data", str(records / f"{kind}.jsonl"), "--eval-data", str(records / "pairs.jsonl"), "--lr", "3e-3",
              "--warmup-steps", "1", "--batch-size", "2", "--max-steps", "3", "--no-bf16"]
    sft.main([*common, "--lora-rank", lora, "--optim", "adamw", "--out", str(tmp_path / "sft")])
    dpo.main([*common, "--lora-rank", "4", "--out", str(tmp_path / "dpo")])
    losses = [row["loss"] for row in rows(tmp_path / "sft")]
    first, *_, last = [row["loss"] for row in rows(tmp_path / "dpo")]
    assert losses[-1] < losses[0] and abs(first - .693147) < 1e-4 and last < first
    judge = LocalJudge(tmp_path / "dpo" / "model", max_new_tokens=2)
    pair = data.as_question(data.read_records(records / f"{kind}.jsonl", "preference")[0])
    assert len(judge([pair, dataclasses.replace(pair, prompt="two dots")])) == 2            # what was saved loads and answers
