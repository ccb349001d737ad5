#!/usr/bin/env bash
# Every command that made the bundled Toybox checkpoint, eleven and a half hours on two CPU cores, run from the root of the
# repository.
# bash training_examples/train_toybox.sh MEDIA, where MEDIA is a folder with a table of real films and photographs; its model card
# lists those that the checkpoint saw.
set -euo pipefail
MEDIA=$1
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1

# 1. Tokenizers and three small text encoders, one with its vision half
python training_examples/train_text_encoders.py --output_dir runs/text_encoders

# 2. The autoencoder: pictures, clips in all looks and colours, both sizes, then more of what turns and bounces
tae() {
    torchrun --nproc_per_node 2 training_examples/train_tae.py --data "$MEDIA" --exclude "heldout-*" \
        --config training_examples/configs/"$@"
}
tae toybox_tae_image.yaml --output_dir runs/tae_image
tae toybox_tae_varied.yaml --image_autoencoder runs/tae_image/vae --output_dir runs/tae_varied
tae toybox_tae.yaml --autoencoder runs/tae_varied/vae --output_dir runs/tae_both
tae toybox_tae_motion.yaml --autoencoder runs/tae_both/vae --output_dir runs/tae
# ... and its decoder alone, on latents with noise in them, then at 64 px only, in two runs
tae toybox_tae_decoder.yaml --autoencoder runs/tae/vae --output_dir runs/tae_decoder
decoder_64() {
    torchrun --nproc_per_node 2 training_examples/train_tae.py \
        --config training_examples/configs/toybox_tae_decoder_64.yaml "$@"
}
decoder_64 --autoencoder runs/tae_decoder/vae --output_dir runs/tae_decoder_64_a
decoder_64 --autoencoder runs/tae_decoder_64_a/vae --output_dir runs/tae_decoder_64_b \
    --shape_weights ring=4 star=3 --motion_weights spins=4 bounces=8 --max_train_steps 600 --seed 5
python training_examples/assemble_pipeline.py --vae runs/tae_decoder_64_b/vae --text_encoders runs/text_encoders \
    --dtype bfloat16 --output_dir runs/frozen

# 3. What the frozen models make of the data
precompute() {
    python training_examples/precompute.py --config training_examples/configs/precompute_toybox.yaml --pipeline runs/frozen \
        --num_images 0 --num_videos 0 --batch_size 8 --output_dir runs/cache/"$@"
}
stills="--looks core two_objects text checkered"
films="--looks core two_objects text camera checkered"
aspects="--aspect_ratios 0.667 1.5"
long="--lengths 32 --frame_rate 16 --batch_size 1"
precompute images $stills --num_images 8000
precompute images_aspects $stills --seed 4 --num_images 2000 --resolution 78 $aspects
precompute films_a $films --num_videos 6500
precompute films_b $films --seed 1 --num_videos 6500
precompute films_16fps $films --seed 2 --num_videos 4000 --lengths 16 32 --frame_rate 16
precompute films_aspects $films --seed 3 --num_videos 3000 --resolution 78 $aspects
precompute films_two --looks two_objects --seed 6 --num_videos 3000
precompute films_two_more --looks two_objects --seed 32 --num_videos 4000
precompute films_motion --looks core --seed 31 --num_videos 6000 --motion_weights spins=4 bounces=4
precompute images_128 $stills person --seed 11 --num_images 3000 --resolution 128
precompute images_128_aspects $stills person --seed 13 --num_images 1000 --resolution 157 $aspects --batch_size 4
precompute images_128_more $stills person --seed 22 --num_images 4000 --resolution 128
precompute images_128_core --looks core --seed 34 --num_images 3000 --resolution 128
precompute films_128 $films person --seed 10 --num_videos 2400 --resolution 128 $long
precompute films_128_more $films person --seed 21 --num_videos 1800 --resolution 128 $long
precompute films_128_core --looks core --seed 33 --num_videos 1200 --resolution 128 $long
precompute films_128_aspects $films person --seed 12 --num_videos 768 --resolution 157 $aspects $long
precompute sft_images $stills --seed 20 --num_images 512
precompute sft_films $stills camera --seed 20 --num_videos 1024
precompute sft_films_16fps $stills camera --seed 21 --num_videos 512 --lengths 16 32 --frame_rate 16
precompute sft_films_aspects $stills camera --seed 22 --num_videos 512 --resolution 78 $aspects
precompute sft_images_128 $stills --seed 23 --num_images 384 --resolution 128
precompute sft_films_128 $stills camera --seed 23 --num_videos 192 --resolution 128 $long
precompute heldout_images --num_images 128 --split held_out
precompute heldout_films $films --num_videos 96 --split held_out
precompute heldout_films_128 $films --num_videos 40 --resolution 128 $long --split held_out

# 4. The backbone: pictures, pictures and films, both sizes (in two and three runs), three models fine-tuned on a small set,
# their mean
backbone() {
    torchrun --nproc_per_node 2 training_examples/train_text_to_video.py --pipeline runs/frozen \
        --config training_examples/configs/"$@"
}
cache() { printf "runs/cache/%s " "$@"; }
small=$(cache images images_aspects films_a films_b films_16fps films_aspects)
large=$(cache images_128 images_128_aspects films_128 films_128_aspects)
larger=$(cache images_128 images_128_more images_128_aspects films_128 films_128_more films_128_aspects)
hard=$(cache films_two films_motion films_two_more)
largest=$(cache images_128 images_128_more images_128_core images_128_aspects \
    films_128 films_128_more films_128_core films_128_aspects)
sft=$(cache sft_images sft_films sft_films_16fps sft_films_aspects sft_images_128 sft_films_128)
heldout=$(cache heldout_films heldout_films_128)
backbone toybox_t2i.yaml --output_dir runs/t2i \
    --data $(cache images images_aspects) --validation_data runs/cache/heldout_images
backbone toybox_t2iv.yaml --transformer runs/t2i/pipeline --output_dir runs/t2iv_a \
    --data $small --validation_data runs/cache/heldout_films
backbone toybox_t2iv.yaml --transformer runs/t2iv_a/pipeline --output_dir runs/t2iv \
    --data $small runs/cache/films_two --validation_data runs/cache/heldout_films \
    --max_train_steps 4200 --learning_rate 3e-3 --ema_decay 0.999
backbone toybox_t2iv_128.yaml --transformer runs/t2iv/pipeline --output_dir runs/t2iv_128_a \
    --data $small runs/cache/films_two $large --validation_data $heldout
backbone toybox_t2iv_128.yaml --transformer runs/t2iv_128_a/pipeline --output_dir runs/t2iv_128_b \
    --data $small runs/cache/films_two $larger --validation_data $heldout \
    --max_train_steps 6000 --learning_rate 2.5e-3 --logit_mean -1 --images_to_videos 1 2
backbone toybox_t2iv_128.yaml --transformer runs/t2iv_128_b/pipeline --output_dir runs/t2iv_128 \
    --data $small $hard $largest --validation_data $heldout \
    --max_train_steps 5500 --learning_rate 2e-3 --logit_mean -1 --images_to_videos 1 3
fine_tune() {
    backbone toybox_sft.yaml --transformer runs/t2iv_128/pipeline --data $sft --validation_data $heldout "$@"
}
fine_tune --seed 11 --learning_rate 3e-4 --output_dir runs/sft_a
fine_tune --seed 12 --learning_rate 4e-4 --output_dir runs/sft_b
fine_tune --seed 13 --learning_rate 6e-4 --output_dir runs/sft_c
python training_examples/average_checkpoints.py runs/sft_a/pipeline runs/sft_b/pipeline runs/sft_c/pipeline --output_dir runs/sft

# 5. On with the backbone, on new scenes, most of them of 64 px, and of those more of what it failed at
harder="--shape_weights ring=2 star=2 --motion_weights spins=3 bounces=3"
hardest="--shape_weights ring=100 star=50 triangle=100 --motion_weights spins=100 bounces=100"
precompute new_films $films $harder --seed 40 --num_videos 8000
precompute new_films_core --looks core $harder --seed 41 --num_videos 12000
precompute new_films_hard --looks core $hardest --seed 50 --num_videos 5000
precompute new_films_two --looks two_objects --seed 42 --num_videos 8000
precompute new_films_16fps $films $harder --seed 44 --num_videos 3000 --lengths 16 32 --frame_rate 16
precompute new_films_aspects $films --seed 47 --num_videos 2500 --resolution 78 $aspects
precompute new_images $stills --seed 43 --num_images 6000
precompute new_images_aspects $stills --seed 48 --num_images 1200 --resolution 78 $aspects
precompute new_images_128 $stills --seed 45 --num_images 2000 --resolution 128
precompute new_films_128 $films --seed 46 --num_videos 640 --resolution 128 $long
precompute new_films_128_aspects $films --seed 49 --num_videos 160 --resolution 157 $aspects $long
new=$(cache new_films new_films_core new_films_hard new_films_two new_films_16fps new_films_aspects \
    new_images new_images_aspects new_images_128 new_films_128 new_films_128_aspects)
backbone toybox_t2iv_128.yaml --transformer runs/sft --output_dir runs/t2iv_new \
    --data $new --validation_data runs/cache/heldout_films \
    --max_train_steps 4800 --learning_rate 2.5e-3 --logit_mean -1 --images_to_videos 1 4 --seed 5
# The mean of before and after is as good at 64 px as the latter, and at 128 px not as much worse than the former.
python training_examples/average_checkpoints.py runs/sft runs/t2iv_new/pipeline --output_dir runs/t2iv_mean

# 6. The same once more from there, with more pictures of 128 px and more rings and stars
rings_and_stars="--shape_weights ring=100 star=100 --motion_weights spins=100 bounces=100"
precompute new_images_128_more $stills --seed 60 --num_images 3000 --resolution 128
precompute new_images_128_core --looks core --seed 61 --num_images 3000 --resolution 128
precompute new_films_hard_more --looks core $rings_and_stars --seed 62 --num_videos 5000
precompute new_films_core_more --looks core $harder --seed 63 --num_videos 6000
more=$(cache new_images_128_more new_images_128_core new_films_hard_more new_films_core_more)
backbone toybox_t2iv_128.yaml --transformer runs/t2iv_mean --output_dir runs/t2iv_more \
    --data $new $more --validation_data runs/cache/heldout_films \
    --max_train_steps 3200 --learning_rate 2e-3 --logit_mean -1 --images_to_videos 1 3 --seed 6
