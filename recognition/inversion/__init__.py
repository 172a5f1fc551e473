"""Faces from a trained network alone: images whose embedding is a class centre or a given one.

ArcFace's inversion (arXiv:1801.07698 section 3.3, Alg. 1). A batch of images starts as N(0, 1) and
Adam moves it against

    L = identity + bn_weight * BN + tv_weight * TV + l2_weight * |I|

BN is how far the inputs of the BatchNorms are from the statistics that these stored in training.
identity: of a class (closed set) the loss that the head was trained with, its rows frozen and
sharded over the ranks; of any embedding (open set) the squared distance of the unit embeddings.
"""
