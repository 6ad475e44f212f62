"""What DP-Mix is compared with: mixup across records, and pre-training."""
