#!/usr/bin/env bash
# Every command that made the bundled checkpoint of sound, not quite five hours on two CPU cores, run from the root of the
# repository. bash training_examples/train_toybox_audio.sh MEDIA, where MEDIA is a folder with a table of real films that have sound;
# the card lists those that the checkpoint heard.
set -euo pipefail
MEDIA=$1
# The three of malloc keep freed memory: giving it back and asking for it again takes longer than the convolutions.
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456

dac_vae() {
    torchrun --nproc_per_node 2 training_examples/train_dac_vae.py --config training_examples/configs/toybox_dac_vae.yaml \
        --data "$MEDIA" --exclude "heldout-*" "$@"
}
# The frozen models as a pipeline, in the types of the bundle
assemble() {
    python training_examples/assemble_pipeline.py --kind audio --dtype bfloat16 --image_encoder runs/audio/vision --squeeze_images \
        --text_encoders diffusers_moviegen/checkpoints/toybox --segment_length_in_s 2 "$@"
}
# What they make of films of two seconds, windows of longer ones, or held-out films
precompute() {
    torchrun --nproc_per_node 2 training_examples/precompute_audio.py \
        --config training_examples/configs/toybox_precompute_audio.yaml "$@"
}
backbone() {
    torchrun --nproc_per_node 2 training_examples/train_audio.py --config training_examples/configs/toybox_audio.yaml "$@"
}

# 1. An image encoder that sees shapes and places, from that of the films' checkpoint
python training_examples/train_image_encoder.py --text_encoders diffusers_moviegen/checkpoints/toybox \
    --output_dir runs/audio/vision --steps 4500

# 2. An autoencoder, in the end with more of what it finds hardest: crickets and the shaker's knocks; and a backbone
dac_vae --output_dir runs/audio/dac_vae_a
dac_vae --autoencoder runs/audio/dac_vae_a/vae --output_dir runs/audio/dac_vae_b --seed 1 --max_train_steps 900 \
    --learning_rate 2e-4 --lr_warmup_steps 30 --stft_weight 5 --tones 0.3 --shape_weights star=3 \
    --background_weights brown=4 grey=2 navy=2 pink=2 --motion_weights bounces=4 grows=2
assemble --vae runs/audio/dac_vae_b/vae --output_dir runs/audio/frozen_b
precompute --pipeline runs/audio/frozen_b --output_dir runs/audio/cache_b/films --num_samples 10240 \
    --motion_weights bounces=4 grows=3 shrinks=3 spins=3
precompute --pipeline runs/audio/frozen_b --output_dir runs/audio/cache_b/windows --num_samples 768 --seed 1 \
    --film_seconds 6 --window_seconds 2 --num_windows 2 --motion_weights bounces=8
precompute --pipeline runs/audio/frozen_b --output_dir runs/audio/cache_b/heldout_films --num_samples 64 --split held_out
backbone --transformer_config training_examples/configs/toybox_audio_transformer.json --pipeline runs/audio/frozen_b \
    --data runs/audio/cache_b/films runs/audio/cache_b/windows --validation_data runs/audio/cache_b/heldout_films \
    --output_dir runs/audio/dit_b

# 3. An autoencoder that bears the noise a backbone leaves in its latents: without, the knocks of a shaker hiss. The backbone goes
# on with its latents and new films
dac_vae --autoencoder runs/audio/dac_vae_b/vae --output_dir runs/audio/dac_vae --seed 2 --max_train_steps 1200 \
    --learning_rate 3e-4 --lr_warmup_steps 30 --stft_weight 5 --tones 0.25 --latent_noise 0.3 --shape_weights star=6 \
    --background_weights brown=4 grey=2 navy=2 pink=3 --motion_weights bounces=6 grows=2
assemble --vae runs/audio/dac_vae/vae --output_dir runs/audio/frozen
precompute --pipeline runs/audio/frozen --output_dir runs/audio/cache/films --num_samples 10240 --seed 2 \
    --motion_weights bounces=4 grows=3 shrinks=3 spins=3
precompute --pipeline runs/audio/frozen --output_dir runs/audio/cache/windows --num_samples 1024 --seed 3 \
    --film_seconds 6 --window_seconds 2 --num_windows 2 --motion_weights bounces=8
precompute --pipeline runs/audio/frozen --output_dir runs/audio/cache/heldout_films --num_samples 64 --split held_out
backbone --transformer runs/audio/dit_b/pipeline --pipeline runs/audio/frozen --seed 1 --max_train_steps 12000 \
    --learning_rate 3e-3 --data runs/audio/cache/films runs/audio/cache/windows \
    --validation_data runs/audio/cache/heldout_films --output_dir runs/audio/dit

# 4. On with the backbone, where voices are decided, in much noise; half of the films are new, with more stars, and most of these in
# wrong colours, so that a voice follows from the shape rather than from the motion and the background it was seen with
precompute --pipeline runs/audio/frozen --output_dir runs/audio/cache/films_more --num_samples 12288 --seed 5 \
    --shape_weights star=2 --motion_weights bounces=4 grows=3 shrinks=3 spins=3 --colour_augmentation 0.6
voices() {
    backbone --pipeline runs/audio/frozen --logit_mean -1.2 \
        --data runs/audio/cache/films runs/audio/cache/films_more runs/audio/cache/windows \
        --validation_data runs/audio/cache/heldout_films "$@"
}
voices --transformer runs/audio/dit/pipeline --seed 2 --max_train_steps 10500 --learning_rate 2.5e-3 \
    --output_dir runs/audio/dit_more
voices --transformer runs/audio/dit_more/pipeline --seed 3 --max_train_steps 2800 --learning_rate 1.5e-3 \
    --output_dir runs/audio/dit_most
python training_examples/average_checkpoints.py runs/audio/dit_more/pipeline runs/audio/dit_most/pipeline \
    --output_dir runs/audio/toybox_audio
