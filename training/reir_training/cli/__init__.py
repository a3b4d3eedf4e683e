"""The commands `reir train`, `finetune`, `label`, `calibrate` and `data check`."""
