"""Fine-tune, probe or evaluate a pretrained encoder: `python main_finetune.py --help`."""

from mae_et.cli import main_finetune

if __name__ == "__main__":
    main_finetune()
