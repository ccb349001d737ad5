#!/usr/bin/env bash
# Every command that made the bundled checkpoint of sound, two and a half hours on two CPU cores, run from the root of the repository.
# bash training_examples/train_toybox_audio.sh MEDIA, where MEDIA is a folder with a table of real films that have sound; the card
# lists those that the checkpoint heard.
set -euo pipefail
MEDIA=$1
# The three of malloc keep freed memory: giving it back and asking for it again takes longer than the convolutions.
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456

# 1. An image encoder that sees shapes and places, from that of the films' checkpoint
python training_examples/train_image_encoder.py --text_encoders diffusers_moviegen/checkpoints/toybox \
    --output_dir runs/audio/vision --steps 4500

# 2. The autoencoder, in the end with more of what it finds hardest: crickets and the shaker's knocks. Then the frozen models as a
# pipeline, in the types of the bundle
dac_vae() {
    torchrun --nproc_per_node 2 training_examples/train_dac_vae.py --config training_examples/configs/toybox_dac_vae.yaml \
        --data "$MEDIA" --exclude "heldout-*" "$@"
}
dac_vae --output_dir runs/audio/dac_vae_a
dac_vae --autoencoder runs/audio/dac_vae_a/vae --output_dir runs/audio/dac_vae --seed 1 --max_train_steps 900 \
    --learning_rate 2e-4 --lr_warmup_steps 30 --stft_weight 5 --tones 0.3 --shape_weights star=3 \
    --background_weights brown=4 grey=2 navy=2 pink=2 --motion_weights bounces=4 grows=2
python training_examples/assemble_pipeline.py --kind audio --vae runs/audio/dac_vae/vae --dtype bfloat16 \
    --text_encoders diffusers_moviegen/checkpoints/toybox --image_encoder runs/audio/vision --squeeze_images \
    --segment_length_in_s 2 --output_dir runs/audio/frozen

# 3. What the frozen models make of the data: films of two seconds, windows of longer ones, held-out films
precompute() {
    torchrun --nproc_per_node 2 training_examples/precompute_audio.py --pipeline runs/audio/frozen \
        --config training_examples/configs/toybox_precompute_audio.yaml --output_dir runs/audio/cache/"$@"
}
precompute films --num_samples 10240 --motion_weights bounces=4 grows=3 shrinks=3 spins=3
precompute windows --seed 1 --num_samples 768 --film_seconds 6 --window_seconds 2 --num_windows 2 --motion_weights bounces=8
precompute heldout_films --num_samples 64 --split held_out

# 4. The backbone
torchrun --nproc_per_node 2 training_examples/train_audio.py --config training_examples/configs/toybox_audio.yaml \
    --pipeline runs/audio/frozen --data runs/audio/cache/films runs/audio/cache/windows \
    --validation_data runs/audio/cache/heldout_films --output_dir runs/audio/dit
