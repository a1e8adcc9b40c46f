// What the library asks of Linux before it uses tile registers.
#include "../../runtime/src/cpu_features.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <sys/syscall.h>
#include <unistd.h>

namespace {
using namespace holdfast;

bool tiles_permitted() {
    constexpr int get_permissions = 0x1022, tile_data = 18;
    uint64_t permitted = 0;
    return syscall(SYS_arch_prctl, get_permissions, &permitted) == 0 && permitted >> tile_data & 1;
}

TEST(Tiles, AreAskedForWhenNeededAndNotBefore) {
    EXPECT_FALSE(tiles_permitted());
    EXPECT_EQ(missing_cpu_features("amx_tile").empty(), (cpu_features() + " ").find("amx_tile ") != std::string::npos);
    EXPECT_FALSE(tiles_permitted());
    const std::string missing = missing_permission_for_tiles();
    EXPECT_EQ(missing.empty(), tiles_permitted());
    EXPECT_TRUE(missing.empty() || missing.find("Linux's permission for tile registers (arch_prctl: ") == 0) << missing;
    EXPECT_EQ(missing_permission_for_tiles(), missing);
}

}  // namespace
