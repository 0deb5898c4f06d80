"""Bytes as block devices: FUSE tree, overlay disks, iSCSI targets, the supervisor."""
