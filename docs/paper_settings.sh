#!/usr/bin/env bash
# Every setting that the paper's abstract leaves open, at the values of the preset volume3d. Whoever
# holds the paper sets what it says. Further options, such as --data.path, are passed on:
#   bash docs/paper_settings.sh --data.name=nifti_folder --data.path=mine
set -euo pipefail

settings=(
  # Data: which contrasts, on which grid, scaled how (the abstract: different modalities)
  --data.modalities t2w adc hbv
  --data.preprocess.spacing-mm 3.0 0.5 0.5
  --data.preprocess.size 20 256 256
  --data.preprocess.centre image
  --data.preprocess.label-sampling linear
  --data.preprocess.clip-percentiles 0.5 99.5
  --data.preprocess.scales
  # Folds (the abstract: five, of 358 cases)
  --num-folds 5
  --folds-file None
  --init None
  --seed 0
  # Encoders: stages, width, kernels and strides d h w, normalisation, shared weights or not
  --network.encoder.channels 32 64 128 256 320 320
  --network.encoder.kernels.0 1 3 3
  --network.encoder.kernels.1 1 3 3
  --network.encoder.kernels.2 3 3 3
  --network.encoder.kernels.3 3 3 3
  --network.encoder.kernels.4 3 3 3
  --network.encoder.kernels.5 3 3 3
  --network.encoder.strides.0 1 1 1
  --network.encoder.strides.1 1 2 2
  --network.encoder.strides.2 1 2 2
  --network.encoder.strides.3 2 2 2
  --network.encoder.strides.4 2 2 2
  --network.encoder.strides.5 1 2 2
  --network.encoder.blocks 1 1 2 2 2 2
  --network.encoder.norm instance
  --network.encoder.block residual
  --network.encoder.activation leaky_relu
  --network.encoder.negative-slope 0.01
  # Attention across slices (none in the abstract): CSAM or CAT-Net, and their constants
  --network.encoder.slices none
  --network.encoder.slice-attention.stages None
  --network.encoder.slice-attention.onward False
  --network.encoder.slice-attention.reduction 16
  --network.encoder.slice-attention.kernel 7
  --network.encoder.slice-attention.expansion 4
  --network.encoder.slice-attention.opening 3.0
  --network.encoder.slice-attention.sampling False
  --network.encoder.slice-attention.rank 5
  --network.encoder.slice-attention.heads 3
  --network.encoder.slice-attention.pooling 4
  --network.share-encoders False
  # Spatial correlated feature fusion: its form (the abstract: complementary correlation, non-linear)
  --network.fusion.kind scff
  --network.fusion.expression nonlinear
  --network.fusion.hidden 16
  --network.fusion.gate-kernel 3
  --network.fusion.gate-identity True
  --network.fusion.residual True
  --network.fusion.stages None
  --network.fusion.correlation-direction forward
  --network.fusion.correlation-stop-gradient True
  # Decoder: blocks, deep supervision, first bias
  --network.decoder-block residual
  --network.decoder-blocks 1
  --network.deep-supervision 3
  --network.head-bias -4.0
  --network.distance-clip-mm None
  # Segmentation losses
  --loss.region dice
  --loss.voxel cross_entropy
  --loss.region-weight 1.0
  --loss.voxel-weight 1.0
  --loss.smooth 0.01
  --loss.tversky-alpha 0.3
  --loss.tversky-beta 0.7
  --loss.focal-gamma 2.0
  --loss.focal-alpha None
  --loss.region-over example
  --loss.class-weights None
  --loss.deep-weight 0.5
  # Attention maps and who teaches whom, at which stages, by which distance, how strongly
  --loss.cross-modal-weight 0.1
  --loss.self-weight 0.1
  --loss.correlation-weight 0.0
  --loss.attention.kind mean
  --loss.attention.exponent 2.0
  --loss.attention.normalization l2
  --loss.attention.temperature 1.0
  --loss.stages None
  --loss.pairs mutual
  # Modalities alone, as the abstract has it; the preset adds the label (docs/concepts/distillation.md)
  --loss.teachers all
  --loss.label-weight 0.3
  --loss.fused-weight 0.1
  --loss.average-weight 0.1
  --loss.average-output-weight 1.0
  --loss.distance-weight 1.0
  --loss.distance l2
  --loss.reduction sum
  --loss.stop-gradient True
  --loss.warmup-steps 1000
  # Optimiser and schedule
  --train.optimizer.kind adamw
  --train.optimizer.learning-rate 0.001
  --train.optimizer.weight-decay 0.0001
  --train.optimizer.beta1 0.9
  --train.optimizer.beta2 0.999
  --train.optimizer.epsilon 1e-8
  --train.optimizer.momentum 0.9
  --train.optimizer.nesterov False
  --train.optimizer.decay cosine
  --train.optimizer.decay-power 0.9
  --train.optimizer.decay-milestones 0.5 0.75
  --train.optimizer.decay-factor 0.1
  --train.optimizer.warmup-fraction 0.05
  --train.optimizer.clip-norm 1.0
  # Augmentation
  --train.augmentation.flip-probability 0.5
  --train.augmentation.affine-probability 0.5
  --train.augmentation.rotation-degrees 15.0
  --train.augmentation.scale 0.85 1.15
  --train.augmentation.translation-voxels 4.0
  --train.augmentation.elastic-probability 0.0
  --train.augmentation.elastic-voxels 3.0
  --train.augmentation.elastic-nodes 5
  --train.augmentation.misalignment-probability 0.3
  --train.augmentation.misalignment-voxels 2.0
  --train.augmentation.blur-probability 0.1
  --train.augmentation.blur-sd-voxels 0.5 1.0
  --train.augmentation.bias-probability 0.2
  --train.augmentation.bias-amplitude 0.3
  --train.augmentation.contrast-probability 0.2
  --train.augmentation.contrast 0.8 1.25
  --train.augmentation.brightness 0.2
  --train.augmentation.gamma-probability 0.2
  --train.augmentation.gamma 0.7 1.5
  --train.augmentation.noise-probability 0.2
  --train.augmentation.noise-sd 0.2
  # Steps, batch, crop, sampling, averaging of the weights
  --train.steps 20000
  --train.batch-size 2
  --train.crop 20 160 160
  --train.foreground-share 0.3333333333333333
  --train.unlabelled 0.0
  --train.modality-dropout 0.0
  --train.average-decay 0.999
  --train.validations 20
  # Two networks one after the other: none
  --cascade.target ""
  --cascade.coarser 1 2 2
  --cascade.steps None
  --cascade.box-mm 60 72 72
  --cascade.margin-mm 6.0
  # Prediction
  --predict.overlap 0.5
  --predict.flip True
  --predict.threshold 0.5
  --predict.draws 8
  --predict.mask-from probability
  --predict.distance-width-mm 1.0
)

python -m experiments.cv --preset=volume3d "${settings[@]}" "$@"
