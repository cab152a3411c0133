"""One recipe on a GPU within minutes: CIFAR-10 or emoji, from images to figures and a grid.

    python -m benchmarks.gpu_recipe --data cifar10 --path_to_train data/cifar10/train.csv \\
        --path_to_test data/cifar10/test.csv

After the two trainings, 5,000 images are sampled and compared with the test images. Stages, folders
and figures are those of `benchmarks.recipes`.
"""

from benchmarks import recipes
from utils import cli

RECIPES = {
    "cifar10": """
        train_vqvae --channels 128 --codebook_size 1024 --learning_rate 2e-3 --batch_size 256 \
            --horizontal_flip --max_epochs 14 --evaluate_every 616
        quantize_dataset
        train --size small --dropout 0.1 --batch_size 256 --learning_rate 2e-3 --max_epochs 14 \
            --evaluate_every 616
        transformer_generation --num_images 5000 --guidance_scale 1.5
    """,
    "emoji": """
        train_vqvae --image_size 64 --codebook_size 1024 --learning_rate 2e-3 \
            --max_epochs 100 --evaluate_every 1000
        quantize_dataset
        train --size small --dropout 0.2 --learning_rate 1e-3 --max_epochs 80 \
            --evaluate_every 500
        transformer_generation --num_images 5000 --guidance_scale 1.5
    """,
}


if __name__ == "__main__":
    recipes.RECIPES |= RECIPES
    parser = recipes.make_parser()
    parser.set_defaults(data="cifar10", seeds=[0], device="cuda")
    cli.run(recipes.main, parser)
