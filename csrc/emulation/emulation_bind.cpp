// Registers the schemas of the emulated kernels, operators of a namespace of their own: torch.ops.maskdm_fast_emulated.
#include "adamw_ema/schema.h"
#include "common/bind_cuda.h"
#include "emulation/scheduler.h"
#include "gather_tokens/schema.h"
#include "lamb_ema/schema.h"
#include "masked_attention/schema.h"
#include "masked_dsm_loss/schema.h"
#include "noise_visible_patches/schema.h"
#include "sid_loss/schema.h"

namespace maskdm {
namespace {

// order: 0 ascending, 1 descending, 2 shuffled by seed
void set_order(int64_t order, int64_t seed) {
  emulation::set_order(static_cast<emulation::Order>(order), static_cast<uint64_t>(seed));
}

}  // namespace
}  // namespace maskdm

STABLE_TORCH_LIBRARY_FRAGMENT(maskdm_fast_emulated, m) {
  m.def(maskdm::kAdamwEmaSchema);
  m.def(maskdm::kGlobalNormSchema);
  m.def(maskdm::kLambEmaSchema);
  m.def(maskdm::kGatherTokensFwdSchema);
  m.def(maskdm::kScatterTokensFwdSchema);
  m.def(maskdm::kScatterTokensBwdSchema);
  m.def(maskdm::kMaskedAttentionFwdSchema);
  m.def(maskdm::kMaskedAttentionBwdSchema);
  m.def(maskdm::kMaskedDsmLossFwdSchema);
  m.def(maskdm::kMaskedDsmLossBwdSchema);
  m.def(maskdm::kNoiseVisiblePatchesFwdSchema);
  m.def(maskdm::kSidLossFwdSchema);
  m.def(maskdm::kSidLossBwdSchema);
  m.def("set_order(int order, int seed) -> ()");
  m.def("planted(str kernel, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(maskdm_fast_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&maskdm::set_order));
}
