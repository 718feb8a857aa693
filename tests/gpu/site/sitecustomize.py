"""What torch does on a GPU beside CUDA's runtime, done without one.

Python imports this at each start where PYTHONPATH names its folder, so that processes that a
command starts have it too. It mends torch as soon as torch is imported.
"""

import importlib.abc
import importlib.machinery
import sys

MOST_PLACES = 1 << 20


class _Torch(importlib.abc.MetaPathFinder):
    """Finds torch as it is found without this, and mends it once it has run."""

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name) if name == "torch" else None
        if spec is None:
            return None
        run = spec.loader.exec_module

        def run_and_mend(module):
            run(module)
            _mend(module)

        spec.loader.exec_module = run_and_mend
        return spec


def _mend(torch):
    """Replace what cuDNN and NVRTC compute, shapes that depend on values, and CUPTI's profiler.

    Convolutions have no kernels without cuDNN; their shapes are those of the meta device.
    """
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    aten, meta = torch.ops.aten, torch.device("meta")

    def nonzero(x):
        """Return that all of x is not zero; of 3 dimensions and more, as of masks, some of it.

        Of one dimension the places are true, because runs of masks are made of them: what lies in
        the device's memory is no order of places, and pycocotools may then count for ever.
        """
        if x.dim() == 1:
            return torch.arange(min(x.numel(), MOST_PLACES))[:, None].to(x.device)
        count = x.numel() if x.dim() < 3 else x.shape[0] * x.shape[-1] * 4
        return torch.empty(count, x.dim(), dtype=torch.long, device=x.device)

    def prod(x, dim, keepdim=False, *, dtype=None):
        shape = list(x.shape)
        shape[dim : dim % x.dim() + 1] = [1] if keepdim else []
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)

    def erfinv_(x):
        return x

    def convolution(*args):
        devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"convolution: expected one device, found {devices}")
        return on(devices.pop(), aten.convolution.default(*shapes(args)))

    def convolution_backward(*args):
        found = aten.convolution_backward.default(*shapes(args))
        return tuple(on(args[0].device, tensor) for tensor in found)

    def shapes(args):
        return [arg.to(meta) if isinstance(arg, torch.Tensor) else arg for arg in args]

    def on(device, x):
        if x is None:
            return None
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    class Unprofiled:
        """Records no kernel."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def key_averages(self):
            return []

    torch.profiler.profile = Unprofiled
    library = torch.library.Library("aten", "IMPL")
    library.impl("nonzero", nonzero, "CUDA")
    library.impl("prod.dim_int", prod, "CUDA")
    library.impl("erfinv_", erfinv_, "CUDA")
    library.impl("convolution", convolution, "CUDA")
    library.impl("convolution_backward", convolution_backward, "CUDA")
    torch._null_gpu = library  # holds what was registered


sys.meta_path.insert(0, _Torch())
