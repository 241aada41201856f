// What a launcher's status means.
#pragma once

namespace kd::cuda {

const char* status_text(int status);

}  // namespace kd::cuda
