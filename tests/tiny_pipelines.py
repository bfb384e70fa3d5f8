"""Tiny random pipelines of the generator families, from their own configs: make(family) -> (pipeline, the arguments of a call)."""
import diffusers as df
import numpy as np
import torch
import transformers as hf
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from reward import leave_out_video

NEGATIVE = "blurry, low quality"
SPECIAL = ["<bos>", "<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
CLIP_SIZES = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, vocab_size=400, bos_token_id=0, pad_token_id=1, eos_token_id=2)
QWEN_SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=400)


def tokenizer(length=77, bos=True):
    """Bytes, and the special tokens of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIAL + alphabet)}, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 2)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                      model_max_length=length, chat_template=CHAT)


def clip(kind=hf.CLIPTextModel, width=32):
    return kind(hf.CLIPTextConfig(**CLIP_SIZES | dict(hidden_size=width), projection_dim=width))


def t5(kind="T5"):
    return getattr(hf, f"{kind}EncoderModel")(getattr(hf, f"{kind}Config")(vocab_size=400, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def qwen3(kind=hf.Qwen3Model):
    return kind(hf.Qwen3Config(**QWEN_SIZES, max_position_embeddings=512))


def vae(channels, **options):
    sizes = dict(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1, sample_size=32, scaling_factor=1.5, shift_factor=.06, use_quant_conv=False,
                 use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return df.AutoencoderKL(in_channels=3, out_channels=3, latent_channels=channels, **sizes | options)


def euler(**options):
    return df.FlowMatchEulerDiscreteScheduler(**options)


def flux(kind=df.FluxPipeline):
    transformer = df.FluxTransformer2DModel(patch_size=1, in_channels=16, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
                                            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    pipe = kind(scheduler=euler(shift=3.0, use_dynamic_shifting=True), text_encoder=clip(), text_encoder_2=t5(), tokenizer=tokenizer(), tokenizer_2=tokenizer(512),
                transformer=transformer, vae=vae(4), image_encoder=None, feature_extractor=None)
    return pipe, dict(height=16, width=16, guidance_scale=3.5, max_sequence_length=32)


def flux_true_cfg():
    pipe, args = flux()
    return pipe, {**args, "true_cfg_scale": 3.0, "negative_prompt": NEGATIVE}


SOURCE = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype="uint8"))


def kontext():
    pipe, args = flux(df.FluxKontextPipeline)
    return pipe, {**args, "image": SOURCE, "max_area": 256, "_auto_resize": False}


def flux2():
    transformer = df.Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                             joint_attention_dim=16, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False)
    coder = df.AutoencoderKLFlux2(sample_size=32, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                                  block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False)
    pipe = df.Flux2KleinPipeline(scheduler=euler(use_dynamic_shifting=True), text_encoder=qwen3(hf.Qwen3ForCausalLM), tokenizer=tokenizer(512, bos=False),
                                 transformer=transformer, vae=coder, is_distilled=False)
    return pipe, dict(height=8, width=8, guidance_scale=4.0, max_sequence_length=32, text_encoder_out_layers=(1,))


def sd3():
    transformer = df.SD3Transformer2DModel(sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
                                           joint_attention_dim=32, pooled_projection_dim=64, out_channels=4, qk_norm="rms_norm", dual_attention_layers=(0,))
    encoders = {f"text_encoder{n}": clip(hf.CLIPTextModelWithProjection) for n in ("", "_2")}
    pipe = df.StableDiffusion3Pipeline(scheduler=euler(shift=3.0), **encoders, text_encoder_3=t5(), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
                                       tokenizer_3=tokenizer(256), transformer=transformer, vae=vae(4))
    return pipe, dict(height=16, width=16, guidance_scale=4.5, max_sequence_length=32, negative_prompt=NEGATIVE)


def wan(experts=1):
    transformers = [df.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=256,
                                             ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32) for _ in range(experts)]
    coder = df.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    pipe = df.WanPipeline(transformer=transformers[0], transformer_2=transformers[1] if experts > 1 else None, boundary_ratio=.8 if experts > 1 else None, vae=coder,
                          scheduler=euler(shift=3.0), text_encoder=t5("UMT5"), tokenizer=tokenizer(512))
    args = dict(height=16, width=16, num_frames=5, guidance_scale=4.0, negative_prompt=NEGATIVE, max_sequence_length=32)
    return pipe, args | (dict(guidance_scale_2=3.0) if experts > 1 else {})


def qwen_image():
    transformer = df.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
                                                 joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4))
    coder = df.AutoencoderKLQwenImage(base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True], latents_mean=[.1] * 4, latents_std=[1.3] * 4)
    encoder = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(
        text_config=dict(**QWEN_SIZES, rope_parameters=dict(mrope_section=[1, 1, 2], rope_type="default", rope_theta=1e6)),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, fullatt_block_indexes=[1]),
        vision_start_token_id=6, vision_end_token_id=7, image_token_id=8, video_token_id=9))
    pipe = df.QwenImagePipeline(transformer=transformer, vae=coder, scheduler=euler(shift=3.0, use_dynamic_shifting=True, shift_terminal=.02), text_encoder=encoder,
                                tokenizer=tokenizer(1024, bos=False))
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", 4
    return pipe, dict(height=32, width=32, max_sequence_length=32, true_cfg_scale=4.0, negative_prompt=NEGATIVE)


def qwen_image_edit():
    """Its call needs as many images as prompts; it brings each to a megapixel, here to 64 x 64."""
    pipe, args = qwen_image()
    leave_out_video()
    processor = hf.Qwen2VLProcessor(image_processor=hf.Qwen2VLImageProcessorPil(size=dict(shortest_edge=56 ** 2, longest_edge=56 ** 2)), tokenizer=pipe.tokenizer, chat_template=CHAT)
    dimensions = pipeline_qwenimage_edit.__dict__.setdefault("stock_dimensions", pipeline_qwenimage_edit.calculate_dimensions)
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: dimensions(64 ** 2, ratio)
    pipe = df.QwenImageEditPipeline(**pipe.components, processor=processor)
    pipe.prompt_template_encode = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    pipe.prompt_template_encode_start_idx = 4
    return pipe, {**args, "image": [SOURCE] * 3}


def wan_image_to_video():
    """Its call takes one image; the text is 512 tokens long, as its attention has that number written in."""
    pipe, args = wan()
    transformer = df.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=32, freq_dim=256,
                                           ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, image_dim=8,
                                           added_kv_proj_dim=24)
    encoder = hf.CLIPVisionModel(hf.CLIPVisionConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8))
    pixels = hf.CLIPImageProcessorPil(crop_size=dict(height=32, width=32), size=dict(shortest_edge=32))
    parts = {k: v for k, v in pipe.components.items() if k not in ("transformer", "transformer_2")}
    args.pop("max_sequence_length")
    pipeline_wan_i2v.prompt_clean = str.strip        # the stock one calls the package ftfy without looking whether it is there
    return df.WanImageToVideoPipeline(**parts, transformer=transformer, image_encoder=encoder, image_processor=pixels), {**args, "image": SOURCE}


def z_image():
    transformer = df.ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                                              norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    pipe = df.ZImagePipeline(transformer=transformer, vae=vae(16, block_out_channels=[32, 64], norm_num_groups=32), scheduler=euler(shift=3.0), text_encoder=qwen3(),
                             tokenizer=tokenizer(512, bos=False))
    return pipe, dict(height=32, width=32, guidance_scale=3.0, max_sequence_length=32)


def sana():
    transformer = df.SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
                                            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32)
    stages = ("ResBlock", "EfficientViTBlock")
    coder = df.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=stages, decoder_block_types=stages, encoder_block_out_channels=(8, 8),
                             decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
                             decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
                             decoder_act_fns="silu", scaling_factor=.41407)
    encoder = hf.Gemma2Model(hf.Gemma2Config(head_dim=16, hidden_size=8, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2, vocab_size=400,
                                             attn_implementation="eager"))
    pipe = df.SanaPipeline(transformer=transformer, vae=coder, scheduler=euler(shift=3.0), text_encoder=encoder, tokenizer=tokenizer(300))
    return pipe, dict(height=32, width=32, guidance_scale=4.5, negative_prompt=NEGATIVE, max_sequence_length=32, complex_human_instruction=None, use_resolution_binning=False)


def ltx():
    transformer = df.LTXVideoTransformer3DModel(in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
                                                cross_attention_dim=32, num_layers=1, caption_channels=32)
    scaling = (True, True, False, False)
    coder = df.AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, spatio_temporal_scaling=scaling,
                                     decoder_spatio_temporal_scaling=scaling, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
                                     encoder_causal=True, decoder_causal=False)
    coder.use_framewise_encoding = coder.use_framewise_decoding = False
    pipe = df.LTXPipeline(transformer=transformer, vae=coder, scheduler=euler(use_dynamic_shifting=True, shift_terminal=.1), text_encoder=t5(), tokenizer=tokenizer(128))
    return pipe, dict(height=32, width=32, num_frames=9, guidance_scale=3.0, negative_prompt=NEGATIVE, max_sequence_length=32)


def hunyuan_video():
    transformer = df.HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
                                                    num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
                                                    rope_axes_dim=(2, 4, 4))
    coder = df.AutoencoderKLHunyuanVideo(in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
                                         up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, act_fn="silu", norm_num_groups=4,
                                         scaling_factor=.476986, spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True)
    encoder = hf.LlamaModel(hf.LlamaConfig(**CLIP_SIZES | dict(hidden_size=16)))
    left = tokenizer(512)
    left.padding_side = "left"
    pipe = df.HunyuanVideoPipeline(transformer=transformer, vae=coder, scheduler=euler(shift=7.0), text_encoder=encoder, text_encoder_2=clip(width=8), tokenizer=left,
                                   tokenizer_2=tokenizer())
    return pipe, dict(height=16, width=16, num_frames=5, guidance_scale=4.5, max_sequence_length=32, prompt_template=dict(template="{}", crop_start=0))


def open_gates(transformer):
    """Draw what is 0 at first: gates of the blocks, without which these do nothing."""
    for p in transformer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=.1)


def cogview4():
    """Its times are even steps, its noise levels are shifted. It pads prompts without a mask."""
    transformer = df.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=4, text_embed_dim=32, time_embed_dim=8, condition_dim=4)
    scheduler = euler(base_shift=.25, max_shift=.75, base_image_seq_len=256,
                      use_dynamic_shifting=True, time_shift_type="linear")
    encoder = hf.GlmModel(hf.GlmConfig(
        hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=400, pad_token_id=1))
    pipe = df.CogView4Pipeline(
        transformer=transformer, vae=vae(4, shift_factor=None), scheduler=scheduler,
        text_encoder=encoder, tokenizer=tokenizer(1024, bos=False))
    return pipe, dict(height=16, width=16, guidance_scale=4.0, negative_prompt=NEGATIVE,
                      max_sequence_length=32)


def kandinsky5(visual_cond=False):
    """It writes its latents, channels last, in place. The released models have visual_cond."""
    transformer = df.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=32, time_dim=32, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=48, ff_dim=128, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(8, 8, 8), visual_cond=visual_cond)
    open_gates(transformer)
    coder = df.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,) * 4,
        layers_per_block=1, norm_num_groups=4)
    qwen = qwen_image()[0]
    leave_out_video()
    processor = hf.Qwen2VLProcessor(image_processor=hf.Qwen2VLImageProcessorPil(),
                                    tokenizer=qwen.tokenizer, chat_template=CHAT)
    pipeline_kandinsky.prompt_clean = str.strip      # the stock one needs ftfy
    pipe = df.Kandinsky5T2VPipeline(
        transformer=transformer, vae=coder, scheduler=euler(shift=7.0), tokenizer=processor,
        text_encoder=qwen.text_encoder, text_encoder_2=clip(), tokenizer_2=tokenizer())
    pipe.prompt_template = "<|im_start|>user\n{}<|im_end|>"
    pipe.prompt_template_encode_start_idx = 4
    return pipe, dict(height=32, width=32, num_frames=5, guidance_scale=5.0,
                      negative_prompt=NEGATIVE, max_sequence_length=32)


MASK = Image.fromarray(np.repeat([[0, 255]], 16, 1).repeat(32, 0).astype("uint8"))


def flux_fill():
    """Its conditioning, the image outside the mask, is drawn from the VAE's posterior."""
    pipe, args = flux()
    config = {**pipe.transformer.config, "in_channels": 16 + 16 + 16, "out_channels": 16}
    parts = {name: pipe.components[name] for name in (
        "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")}
    pipe = df.FluxFillPipeline(**parts, transformer=df.FluxTransformer2DModel(**config))
    return pipe, {**args, "image": SOURCE, "mask_image": MASK}


def flux_img2img():
    """By `strength` it leaves out the first steps of its schedule."""
    pipe, args = flux(df.FluxImg2ImgPipeline)
    return pipe, {**args, "image": SOURCE, "strength": .6}


def auraflow():
    transformer = df.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=256)
    pipe = df.AuraFlowPipeline(
        transformer=transformer, vae=vae(4, shift_factor=None), scheduler=euler(shift=1.73),
        text_encoder=t5("UMT5"), tokenizer=tokenizer(256))
    return pipe, dict(height=16, width=16, guidance_scale=3.5, negative_prompt=NEGATIVE,
                      max_sequence_length=32)


def hidream():
    """Without training mode its experts get no gradient, in it the output has another shape."""
    transformer = df.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=(0, 1))
    sizes = CLIP_SIZES | dict(hidden_size=16, num_hidden_layers=2)
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, attn_implementation="eager"))
    pipe = df.HiDreamImagePipeline(
        transformer=transformer, vae=vae(4), scheduler=euler(shift=3.0),
        text_encoder=clip(hf.CLIPTextModelWithProjection), tokenizer=tokenizer(),
        text_encoder_2=clip(hf.CLIPTextModelWithProjection), tokenizer_2=tokenizer(),
        text_encoder_3=t5(), tokenizer_3=tokenizer(128), text_encoder_4=llama,
        tokenizer_4=tokenizer(128))
    pipe.default_sample_size = 8                     # it brings every size to this area
    return pipe, dict(height=16, width=16, guidance_scale=5.0, negative_prompt=NEGATIVE,
                      max_sequence_length=32)


def prx():
    """With guidance its call takes one prompt; all samples of a call have one time."""
    transformer = df.PRXTransformer2DModel(
        patch_size=1, in_channels=4, context_in_dim=8, hidden_size=8, mlp_ratio=2.0, num_heads=2,
        depth=2, axes_dim=[2, 2])
    open_gates(transformer)
    encoder = T5GemmaEncoder(hf.T5GemmaModuleConfig(
        vocab_size=400, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, dropout_rate=0.0,
        layer_types=["full_attention"]))
    pipe = df.PRXPipeline(
        transformer=transformer, vae=vae(4), scheduler=euler(shift=3.0), text_encoder=encoder,
        tokenizer=tokenizer(64))
    pipe.text_preprocessor.clean_text = str.strip    # the stock one needs ftfy
    return pipe, dict(height=16, width=16, guidance_scale=1.0, use_resolution_binning=False)


def sana_video():
    """Its number of frames is called `frames`."""
    transformer = df.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
        cross_attention_dim=24, caption_channels=8, mlp_ratio=2.5, sample_size=8,
        patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32)
    pipe = df.SanaVideoPipeline(
        transformer=transformer, vae=wan()[0].vae, scheduler=euler(shift=7.0),
        text_encoder=sana()[0].text_encoder, tokenizer=tokenizer(300))
    return pipe, dict(height=32, width=32, frames=9, guidance_scale=6.0, negative_prompt=NEGATIVE,
                      max_sequence_length=32, complex_human_instruction=[],
                      use_resolution_binning=False)


class Harmless:
    """Stands in for the safety checker of Cosmos."""
    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos2():
    """Its noise levels run from 80 to .002, and it takes them by the number of the step."""
    transformer = df.CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32),
        patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False,
        extra_pos_embed_type="learnable")
    pipe = df.Cosmos2TextToImagePipeline(
        transformer=transformer, vae=wan()[0].vae, scheduler=euler(use_karras_sigmas=True),
        text_encoder=t5(), tokenizer=tokenizer(512), safety_checker=Harmless())
    return pipe, dict(height=32, width=32, guidance_scale=3.0, negative_prompt=NEGATIVE,
                      max_sequence_length=32)


def chroma():
    """Its blocks lose the attention mask under gradient checkpointing."""
    transformer = df.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16)
    pipe = df.ChromaPipeline(
        transformer=transformer, vae=vae(4), scheduler=euler(shift=3.0), text_encoder=t5(),
        tokenizer=tokenizer(512))
    return pipe, dict(height=16, width=16, guidance_scale=5.0, negative_prompt=NEGATIVE,
                      max_sequence_length=32)


BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
UNET = dict(block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4)


def sd15(**options):
    unet = df.UNet2DConditionModel(**UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                   cross_attention_dim=32, norm_num_groups=2)
    pipe = df.StableDiffusionPipeline(unet=unet, vae=vae(4, shift_factor=None), scheduler=df.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, **options),
                                      text_encoder=clip(), tokenizer=tokenizer(), safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    return pipe, dict(height=16, width=16, guidance_scale=5.0)


def sdxl(turbo=False):
    unet = df.UNet2DConditionModel(**UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=1,
                                   attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                                   transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80, cross_attention_dim=64)
    scheduler = (df.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing") if turbo else
                 df.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"))
    pipe = df.StableDiffusionXLPipeline(unet=unet, vae=vae(4, shift_factor=None), scheduler=scheduler, text_encoder=clip(), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
                                        text_encoder_2=clip(hf.CLIPTextModelWithProjection), image_encoder=None, feature_extractor=None)
    return pipe, dict(height=16, width=16, guidance_scale=0.0 if turbo else 5.0)


def text_to_video():
    unet = df.UNet3DConditionModel(**UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
                                   cross_attention_dim=32, attention_head_dim=4, norm_num_groups=2)
    pipe = df.TextToVideoSDPipeline(unet=unet, vae=vae(4, shift_factor=None), scheduler=df.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
                                    text_encoder=clip(), tokenizer=tokenizer())
    return pipe, dict(height=16, width=16, num_frames=3, guidance_scale=5.0)


FAMILIES = {"FLUX.1": flux, "FLUX.1 true CFG": flux_true_cfg, "FLUX.1 Kontext": kontext, "FLUX.2": flux2, "SD3.5": sd3, "Qwen-Image": qwen_image, "Qwen-Image-Edit": qwen_image_edit, "Z-Image": z_image,
            "Sana": sana, "Wan 2.1": wan, "Wan 2.2": lambda: wan(2), "Wan image-to-video": wan_image_to_video, "LTX": ltx, "HunyuanVideo": hunyuan_video,
            "Sana video": sana_video}
# driven by grpo.py; tests/test_guards.py shows what sft.py and dpo.py say of them
PARTLY = {"CogView4": cogview4, "Kandinsky 5": kandinsky5, "FLUX.1 Fill": flux_fill,
          "AuraFlow": auraflow, "PRX": prx, "Chroma": chroma}
REFUSED = {"FLUX.1 image-to-image": flux_img2img, "Cosmos 2": cosmos2, "HiDream": hidream,
           "Kandinsky 5 as released": lambda: kandinsky5(visual_cond=True)}
DIFFUSION = {"SD1.5": sd15, "SD2.1": lambda: sd15(prediction_type="v_prediction"), "SDXL": sdxl, "SDXL-Turbo": lambda: sdxl(turbo=True), "text-to-video": text_to_video}


def make(family):
    """(pipeline, the arguments of a call but prompt, steps and generator). Weights that a config leaves empty are drawn as well."""
    torch.manual_seed(0)
    pipe, args = {**FAMILIES, **PARTLY, **REFUSED, **DIFFUSION}[family]()
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        for key, p in module.named_parameters() if module is not None else []:
            if "pad_token" in key or not torch.isfinite(p).all():
                torch.nn.init.normal_(p)
    pipe.set_progress_bar_config(disable=True)
    return pipe, args
