"""A real GPU behind the emulator's interface, so that a sample kernel's case runs on both."""

import functools


class Gpu:
    """CuPy's current device: ``array``, ``empty`` and ``load`` as ``Emulator`` has them."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.arch = int(cupy.cuda.Device().compute_capability)

    def array(self, value, name="array"):
        return self.cupy.asarray(value)

    def empty(self, shape, dtype="float32", name="array"):
        """Filled with ones in every bit, NaN in every floating type, as the emulator's fresh memory is."""
        array = self.cupy.empty(shape, dtype)
        array.view("uint8")[...] = 255
        return array

    def load(self, source, options=(), name=None, file="kernel.cu"):
        # Cooperative launch is a property of CuPy's module, not of the call: both kinds are at hand.
        modules = {
            cooperative: self.cupy.RawModule(
                code=f'#line 1 "{file}"\n{source}',
                options=("--std=c++17", *options),
                name_expressions=(name,),
                enable_cooperative_groups=cooperative,
            )
            for cooperative in (False, True)
        }
        return functools.partial(_launch, {key: module.get_function(name) for key, module in modules.items()})


def _launch(kernels, grid, block, args, *, shared_mem=0, cooperative=False):
    kernel = kernels[cooperative]
    if shared_mem > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared_mem
    kernel(grid, block, args, shared_mem=shared_mem)
