// What llama.cpp's own reader finds in an importance matrix, as JSON. Linked with its common/imatrix-loader.cpp.
#include "imatrix-loader.h"
#include "log.h"

#include <cstdio>

common_log * common_log_main() { return nullptr; }
void common_log_add(common_log *, ggml_log_level, const char * format, ...) { fputs(format, stderr); }
int common_log_get_verbosity_thold() { return 1; }

template <typename T> static void print(const std::vector<T> & values) {
    for (size_t i = 0; i < values.size(); ++i) printf("%s%.9g", i ? ", " : "[", (double) values[i]);
    printf("]");
}

int main(int count, char ** arguments) {
    common_imatrix found;
    if (count != 2 || !common_imatrix_load(arguments[1], found)) return 1;
    printf("{\"chunks\": %d, \"legacy\": %s", found.chunk_count, found.is_legacy ? "true" : "false");
    for (const auto & [name, entry] : found.entries) {
        printf(",\n\"%s\": {\"sums\": ", name.c_str());
        print(entry.sums);
        printf(", \"counts\": ");
        print(entry.counts);
        printf("}");
    }
    printf("}\n");
}
