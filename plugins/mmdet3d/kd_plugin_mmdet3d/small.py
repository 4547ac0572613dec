"""Small detectors for CPUs, as configs: the published architectures on the synthetic scenes' grid, with a width.

All maps cover ``synthetic.AREA``; heads have 32 x 32 cells of 0.8 m.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kd_plugin_mmdet3d.synthetic import AREA, CLASSES, GROUND

Width = Annotated[int, Field(gt=0, multiple_of=4)]
Table = dict[str, Any]
VOXEL = [0.4, 0.4, 6.4]
RANGE = [AREA[0], AREA[1], -3.2, AREA[2], AREA[3], 3.2]
GRID = 64
NORM = {"type": "BN", "eps": 1e-3, "momentum": 0.1}
NORM_1D = {**NORM, "type": "BN1d"}
SIZES = [[4.0, 1.8, 1.6], [7.0, 2.6, 3.0]]


def pointpillars(*, width: Width = 16) -> Table:
    """PointPillars: ``VoxelNet`` with pillars, SECOND and an anchor head; ``width`` channels in the pillars."""
    return {
        "type": "VoxelNet",
        "data_preprocessor": voxels(),
        "voxel_encoder": pillars(width),
        "middle_encoder": {"type": "PointPillarsScatter", "in_channels": width, "output_shape": [GRID, GRID]},
        "backbone": second(width),
        "neck": fpn(width),
        "bbox_head": anchor_head(4 * width),
        **anchor_settings(),
    }


def centerpoint(*, width: Width = 16) -> Table:
    """CenterPoint with pillars: the same features, a centre head with one task for both classes."""
    return {
        "type": "CenterPoint",
        "data_preprocessor": voxels(),
        "pts_voxel_encoder": {**pillars(width), "legacy": False},
        "pts_middle_encoder": {
            "type": "PointPillarsScatter",
            "in_channels": width,
            "output_shape": [GRID, GRID],
        },
        "pts_backbone": second(width),
        "pts_neck": fpn(width),
        "pts_bbox_head": center_head(4 * width, max(width, 16)),
        "train_cfg": {"pts": _center_training()},
        "test_cfg": {"pts": _center_testing()},
    }


def imvoxelnet(*, width: Width = 16) -> Table:
    """ImVoxelNet: a ResNet-18 of ``width`` base channels, lifted to a volume, and the anchor head of ``pointpillars``."""
    x0, y0, x1, y1 = AREA
    levels = [width, 2 * width, 4 * width, 8 * width]
    return {
        "type": "ImVoxelNet",
        "data_preprocessor": {
            "type": "Det3DDataPreprocessor",
            "mean": [110.0] * 3,
            "std": [50.0] * 3,
            "pad_size_divisor": 32,
        },
        "backbone": resnet(width),
        "neck": {"type": "mmdet.FPN", "in_channels": levels, "out_channels": width, "num_outs": 4},
        "neck_3d": {"type": "OutdoorImVoxelNeck", "in_channels": width, "out_channels": 4 * width},
        "bbox_head": anchor_head(4 * width),
        "n_voxels": [32, 32, 12],
        "coord_type": "LIDAR",
        "prior_generator": {
            "type": "AlignedAnchor3DRangeGenerator",
            "ranges": [[x0 + 0.4, y0 + 0.4, -1.6, x1 - 0.4, y1 - 0.4, 1.4]],
            "rotations": [0.0],
        },
        **anchor_settings(),
    }


def mvxnet(*, width: Width = 16) -> Table:
    """MVX-Net's point fusion with pillars: image features are added to each point before the pillars are made."""
    return {
        "type": "MVXFasterRCNN",
        "data_preprocessor": {**voxels(), "mean": [110.0] * 3, "std": [50.0] * 3, "pad_size_divisor": 32},
        "img_backbone": resnet(width),
        "img_neck": {
            "type": "mmdet.FPN",
            "in_channels": [width, 2 * width, 4 * width, 8 * width],
            "out_channels": width,
            "num_outs": 4,
        },
        "pts_voxel_encoder": {
            "type": "HardVFE",
            "in_channels": 4,
            "feat_channels": [width, width],
            "with_cluster_center": True,
            "with_voxel_center": True,
            "voxel_size": VOXEL,
            "point_cloud_range": RANGE,
            "norm_cfg": NORM_1D,
            "fusion_layer": {
                "type": "PointFusion",
                "img_channels": width,
                "pts_channels": width,
                "mid_channels": width,
                "out_channels": width,
                "img_levels": [0],
                "align_corners": False,
                "fuse_out": False,
            },
        },
        "pts_middle_encoder": {
            "type": "PointPillarsScatter",
            "in_channels": width,
            "output_shape": [GRID, GRID],
        },
        "pts_backbone": second(width),
        "pts_neck": fpn(width),
        "pts_bbox_head": anchor_head(4 * width),
        "train_cfg": {"pts": anchor_settings()["train_cfg"]},
        "test_cfg": {"pts": anchor_settings()["test_cfg"]},
    }


def voxels() -> Table:
    layer = {
        "max_num_points": 16,
        "point_cloud_range": RANGE,
        "voxel_size": VOXEL,
        "max_voxels": (2000, 2000),
    }
    return {"type": "Det3DDataPreprocessor", "voxel": True, "voxel_layer": layer}


def pillars(width: int) -> Table:
    return {
        "type": "PillarFeatureNet",
        "in_channels": 4,
        "feat_channels": [width],
        "voxel_size": VOXEL,
        "point_cloud_range": RANGE,
        "norm_cfg": NORM_1D,
    }


def second(width: int) -> Table:
    return {
        "type": "SECOND",
        "in_channels": width,
        "layer_nums": [1, 2],
        "layer_strides": [2, 2],
        "out_channels": [width, 2 * width],
        "norm_cfg": NORM,
    }


def fpn(width: int) -> Table:
    return {
        "type": "SECONDFPN",
        "in_channels": [width, 2 * width],
        "upsample_strides": [1, 2],
        "out_channels": [2 * width, 2 * width],
        "norm_cfg": NORM,
    }


def resnet(width: int) -> Table:
    return {
        "type": "mmdet.ResNet",
        "depth": 18,
        "base_channels": width,
        "stem_channels": width,
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "norm_cfg": {"type": "BN"},
        "style": "pytorch",
    }


def anchor_head(channels: int) -> Table:
    x0, y0, x1, y1 = AREA
    return {
        "type": "Anchor3DHead",
        "num_classes": len(CLASSES),
        "in_channels": channels,
        "feat_channels": channels,
        "use_direction_classifier": True,
        "assign_per_class": True,
        "anchor_generator": {
            "type": "AlignedAnchor3DRangeGenerator",
            "ranges": [[x0, y0, GROUND, x1, y1, GROUND]] * 2,
            "sizes": SIZES,
            "rotations": [0, 1.57],
            "reshape_out": False,
        },
        "diff_rad_by_sin": True,
        "bbox_coder": {"type": "DeltaXYZWLHRBBoxCoder"},
        "loss_cls": {
            "type": "mmdet.FocalLoss",
            "use_sigmoid": True,
            "gamma": 2.0,
            "alpha": 0.25,
            "loss_weight": 1.0,
        },
        "loss_bbox": {"type": "mmdet.SmoothL1Loss", "beta": 1.0 / 9.0, "loss_weight": 2.0},
        "loss_dir": {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.2},
    }


def anchor_settings() -> Table:
    assigner = {
        "type": "Max3DIoUAssigner",
        "iou_calculator": {"type": "mmdet3d.BboxOverlapsNearest3D"},
        "pos_iou_thr": 0.5,
        "neg_iou_thr": 0.35,
        "min_pos_iou": 0.35,
        "ignore_iof_thr": -1,
    }
    return {
        "train_cfg": {
            "assigner": [assigner, assigner],
            "allowed_border": 0,
            "pos_weight": -1,
            "debug": False,
        },
        "test_cfg": {
            "use_rotate_nms": True,
            "nms_across_levels": False,
            "nms_thr": 0.1,
            "score_thr": 0.05,
            "min_bbox_size": 0,
            "nms_pre": 200,
            "max_num": 32,
        },
    }


def center_head(channels: int, shared: int) -> Table:
    return {
        "type": "CenterHead",
        "in_channels": channels,
        "tasks": [{"num_class": len(CLASSES), "class_names": list(CLASSES)}],
        "common_heads": {"reg": (2, 2), "height": (1, 2), "dim": (3, 2), "rot": (2, 2), "vel": (2, 2)},
        "share_conv_channel": shared,
        "bbox_coder": {
            "type": "CenterPointBBoxCoder",
            "post_center_range": [-5.0, -20.0, -10.0, 35.0, 20.0, 10.0],
            "pc_range": RANGE[:2],
            "max_num": 64,
            "score_threshold": 0.05,
            "out_size_factor": 2,
            "voxel_size": VOXEL[:2],
            "code_size": 9,
        },
        "separate_head": {"type": "SeparateHead", "head_conv": shared, "init_bias": -2.19, "final_kernel": 3},
        "loss_cls": {"type": "mmdet.GaussianFocalLoss", "reduction": "mean"},
        "loss_bbox": {"type": "mmdet.L1Loss", "reduction": "mean", "loss_weight": 0.25},
        "norm_bbox": True,
    }


def _center_training() -> Table:
    return {
        "grid_size": [GRID, GRID, 1],
        "voxel_size": VOXEL,
        "point_cloud_range": RANGE,
        "out_size_factor": 2,
        "dense_reg": 1,
        "gaussian_overlap": 0.1,
        "max_objs": 16,
        "min_radius": 1,
        "code_weights": [1.0] * 8 + [0.2, 0.2],
    }


def _center_testing() -> Table:
    return {
        "post_center_limit_range": [-5.0, -20.0, -10.0, 35.0, 20.0, 10.0],
        "max_per_img": 32,
        "min_radius": [1.0],
        "score_threshold": 0.05,
        "pc_range": RANGE[:2],
        "out_size_factor": 2,
        "voxel_size": VOXEL[:2],
        "nms_type": "rotate",
        "pre_max_size": 64,
        "post_max_size": 32,
        "nms_thr": 0.1,
    }
