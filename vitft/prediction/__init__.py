"""What a trained model says about images: their classes, or their features."""
