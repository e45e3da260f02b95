"""The textbook: a Vision Transformer from first principles, one idea per file, smallest first.

Read the chapters in this order:

1. `scalar`, `scalar_vit`: automatic differentiation of single numbers, and a whole ViT built on it.
2. `tensors`: the operations of a ViT on arrays, each next to its backward pass.
3. `patchify`, `embedding`: an image becomes a sequence of tokens.
4. `attention`, `mlp`, `encoder`: tokens exchange information, then each is transformed on its own; repeat.
5. `heads`: tokens become class scores, and scores become a loss.
6. `vit`: the whole model, forward and backward.
7. `augment`, `optim`, `train`: the weights learn.
8. `torch_vit`, `interop`: the same model in torch, and in Transformers' files.

Shapes are written with these letters:

    B  images in a batch         C  channels of an image     H, W  height and width of an image
    P  side of a patch           N  tokens per image         D     width: numbers per token
    A  attention heads           K  head width, D / A        M     hidden width of an MLP

Every forward function `f(x, w)` returns its result and, unless that is x or the result itself, `saved`: what its
backward pass needs. `f_backward(d_y, saved, w)` takes d_y, the gradient of the loss with respect to the result. It
returns d_x, the gradient with respect to x, and d_w, the gradients of the weights, in an object of the same type as w.
"""
