/* Memory that is written for the first time: the operating system adds it page by page, and each of its interruptions costs
 * more than a kernel needs to fill the page. Where it cannot be asked for more at once, nothing here does anything.
 */
#ifndef RLHF_PAGES_H
#define RLHF_PAGES_H

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>

#define PAGE ((uintptr_t)4096)
#define HUGE_PAGE ((uintptr_t)2 << 20)
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* Memory that will be written as a whole may come in huge pages where it spans any: they take no byte outside of it. */
static void ask_for_huge_pages(uintptr_t start, int64_t bytes) {
    const uintptr_t first = (start + HUGE_PAGE - 1) & -HUGE_PAGE, end = (start + (uintptr_t)bytes) & -HUGE_PAGE;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
}

/* Whether a page is not there yet. */
static int pages_are_missing(uintptr_t start, int64_t bytes) {
    unsigned char there[512];
    const uintptr_t end = start + (uintptr_t)bytes;
    for (uintptr_t first = start & -PAGE; first < end; first += sizeof there * PAGE) {
        uintptr_t pages = (end - first + PAGE - 1) / PAGE;
        pages = pages < sizeof there ? pages : sizeof there;
        if (mincore((void *)first, pages * PAGE, there) != 0) return 0;
        for (uintptr_t i = 0; i < pages; i++)
            if (!(there[i] & 1)) return 1;
    }
    return 0;
}

/* All pages of a range at once. What they hold stays. */
static void bring_pages(uintptr_t start, int64_t bytes) {
    const uintptr_t first = start & -PAGE;
    madvise((void *)first, start + (uintptr_t)bytes - first, MADV_POPULATE_WRITE);
}

#else
static void ask_for_huge_pages(uintptr_t start, int64_t bytes) { (void)start, (void)bytes; }
static int pages_are_missing(uintptr_t start, int64_t bytes) { return (void)start, (void)bytes, 0; }
static void bring_pages(uintptr_t start, int64_t bytes) { (void)start, (void)bytes; }
#endif

#endif
