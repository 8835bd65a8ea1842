"""Kernel-accelerated masked diffusion training.

One letter has one meaning in every shape comment of the project:

    B  batch of images                T  packed tokens of a batch (sum of the visible counts)
    N  all patches of an image        P  patch side in pixels
    K  visible patches of an image    C  image channels
    D  token width                    H  attention heads
    E  width of one head
"""

__version__ = "0.1.0"
