"""What training does to images at random: on whole batches, on any device, as functions of (seed, epoch, sample)."""
