// Which instructions this process may use.

#pragma once

#include "interface.h"

namespace dit {

// The level in use: the machine's (processor and operating system), or a lower one asked for.
// At Isa::amx the process has the kernel's permission to use tile data.
Isa isa();

}  // namespace dit
