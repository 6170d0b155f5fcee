"""Pretrain a masked autoencoder: `python main_pretrain.py --help`."""

from mae_et.cli import main_pretrain

if __name__ == "__main__":
    main_pretrain()
