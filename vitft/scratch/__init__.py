"""The textbook: a Vision Transformer from first principles, one idea a file, smallest first.

Read in this order:

1. `scalar`, `scalar_vit`: automatic differentiation of single numbers, and a whole ViT on it.
2. `tensors`: the operations of a ViT on arrays, each beside its backward.
3. `patchify`, `embedding`: an image becomes a sequence of tokens.
4. `attention`, `mlp`, `encoder`: tokens look at each other, then each thinks alone; again and again.
5. `heads`: a sequence becomes class scores, and scores become a loss.
6. `vit`: all of it, forward and backward.
7. `augment`, `optim`, `train`: the weights learn.
8. `torch_vit`, `interop`: the same model in torch, and in Transformers' files.

Shapes are written with these letters:

    B  images in a batch         C  channels of an image     H, W  height and width of an image
    P  side of a patch           N  tokens of an image       D     width: numbers in a token
    A  attention heads           K  head width, D / A        M     hidden width of an MLP

Every forward `f(x, w)` returns its result and, unless that is x or the result itself, what its backward
needs, `saved`. Its backward `f_backward(d_y, saved, w)` takes the gradient of the loss with respect to the
result, d_y, and returns the one with respect to x, d_x, and those of the weights, d_w, in a bundle of the
same type as w.
"""
