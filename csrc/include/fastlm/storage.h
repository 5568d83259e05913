// Floating dtypes in device memory.
#pragma once

namespace fastlm {

enum class Storage : int { float32 = 0, float16 = 1, bfloat16 = 2 };

}  // namespace fastlm
