"""Mistakes in conversion, records, order and batches, where a fault is silent: nothing ends, and the data are wrong."""

from tests.mistakes import Mistake, mistake

SHARDS, FINISH, SURVEY = (f"data_pipeline/conversion/{name}.py" for name in ("shards", "finish", "survey"))
CONVERT, OWNER = "data_pipeline/convert.py", "data_pipeline/owner.py"
TFRECORD, READER, MANIFEST = (f"data_pipeline/format/{name}.py" for name in ("tfrecord", "reader", "manifest"))
PLAN, CLIPS, BATCHES, DECODE, METADATA, AUGMENT, WORDS = (
    f"data_pipeline/input/{name}.py"
    for name in ("plan", "clips", "batches", "decode", "metadata", "augment", "random_words")
)
ANNOTATIONS, IMG2DATASET, PICTURES, INDEX, LPR4M = (
    f"data_pipeline/layouts/{name}.py" for name in ("annotations", "img2dataset", "pictures", "download_index", "lpr4m")
)
LEASE, PROCESSES = (f"data_pipeline/system/{name}.py" for name in ("lease", "processes"))

DURABILITY, LINES = ("tests/test_durability.py",), ("tests/layouts/test_list_lines.py",)
DOWNLOADS = ("tests/layouts/test_img2dataset.py", "tests/layouts/test_lpr4m.py")
RESUMED = ("tests/conversion/test_resume.py",)
CONVERTED = ("tests/test_convert.py", "-k", "not killed and not stopped")
READ, ORDER = ("tests/format/test_reader.py",), ("tests/input/test_plan.py",)
BATCH, AUGMENTED = ("tests/input/test_batches.py",), ("tests/input/test_augment.py", "tests/input/test_random_words.py")
KINDS, DECODED = ("tests/input/test_kinds.py",), ("tests/input/test_decode.py",)
PATHS = ("tests/layouts/test_lpr750k.py",)

MISTAKES: tuple[Mistake, ...] = (
    # -- conversion
    mistake(
        "boxes scaled with x and y exchanged",
        DOWNLOADS,
        (SHARDS, "x, y = (stored / original for", "y, x = (stored / original for"),
    ),
    mistake(
        "a finished shard is kept though a picture was replaced",
        RESUMED,
        (SHARDS, "decisive, states, faults)", "decisive, faults)"),
    ),
    mistake(
        "a finished shard is kept though its bytes are damaged",
        CONVERTED,
        (SHARDS, "(note.size, note.crc) == (path.stat().st_size, file_crc(path))", "note.size == path.stat().st_size"),
    ),
    mistake("files renamed before their bytes are on the disk", DURABILITY, (TFRECORD, "os.fsync(file.fileno())", "")),
    mistake(
        "names of files not brought to the disk", DURABILITY, (TFRECORD, "        os.fsync(folder)\n", "        pass\n")
    ),
    mistake(
        "manifest written before the names of the columns are on the disk",
        DURABILITY,
        (CONVERT, "    sync_folder(options.output / COLUMNS)\n", ""),
    ),
    mistake(
        "shards of an earlier list left in the folder",
        LINES,
        (FINISH, "        (output / stale).unlink()\n", "        pass\n"),
    ),
    mistake(
        "temporary files of a killed writer left",
        ("tests/test_owner.py",),
        (OWNER, "            if not runs:\n", "            if False:\n"),
    ),
    mistake(
        "numbers of lines not shifted in later parts of a list",
        LINES,
        (SURVEY, "before = before if begin else 0", "before = 0"),
    ),
    mistake(
        "usual number of columns is the first row's",
        LINES,
        (SURVEY, "usual = np.argmax(np.bincount(columns[rows], minlength=1))", "usual = columns[rows[0]]"),
    ),
    mistake(
        "category with an id only is the one of that name",
        (
            *RESUMED,
            "tests/layouts/test_lists.py",
            "tests/layouts/test_lpr750k.py",
            "tests/test_convert.py",
            "-k",
            "categor",
        ),
        (SURVEY, '{row.category_name}" if row.category', '{row.category_name}".strip("\\t") if row.category'),
    ),
    mistake(
        "validation's gallery unsorted",
        ("tests/format/test_reader.py", "tests/test_convert.py", "tests/layouts/test_lpr750k.py"),
        (
            SURVEY,
            "    sort_images(listing)\n    return listing\n\n\ndef _arrays",
            "    return listing\n\n\ndef _arrays",
        ),
    ),
    # -- downloads and lists
    mistake(
        "a failed download replaces a stored one of its name",
        DOWNLOADS,
        (INDEX, '(places["state"][at] != STORED) | (found["state"] == STORED)', "np.ones(len(at), bool)"),
    ),
    mistake(
        "a link out of the source is followed at any depth",
        PATHS,
        (PICTURES, "if real != roots[1] and not any(", "if False and not any("),
    ),
    mistake(
        "'..' in a path is not refused",
        PATHS,
        (PICTURES, """ or ".." in path.replace("\\\\", "/").split("/")""", ""),
    ),
    # -- records
    mistake(
        "checksum of a record's data not compared",
        READ,
        (TFRECORD, "[0] != masked_crc(data):", "[0] == -1:"),
    ),
    mistake("ordinal of a record not compared", READ, (READER, "if record.ordinal != ordinals[row]:", "if False:")),
    mistake(
        "offsets of an index not checked for order",
        READ,
        (READER, " and (offsets[1:] > offsets[:-1]).all()", ""),
    ),
    mistake(
        "row at a shard's end read from that shard",
        READ,
        (READER, 'np.searchsorted(self.ends, row, side="right")', 'np.searchsorted(self.ends, row, side="left")'),
    ),
    mistake(
        "counts of the splits not in the content hash",
        READ,
        (MANIFEST, ', "splits": manifest["splits"]}\n    return', "}\n    return"),
    ),
    # -- order
    mistake(
        "every epoch in the same order",
        ORDER,
        (PLAN, "ORDER_STREAM, count, epoch=epoch)", "ORDER_STREAM, count, epoch=0)"),
    ),
    mistake(
        "the seed does not decide the order",
        ORDER,
        (PLAN, "random_words(seed, ORDER_STREAM", "random_words(0, ORDER_STREAM"),
    ),
    mistake(
        "clips that are left out are shown",
        ORDER,
        (PLAN, "return picked.copy() if self.keep is None else self.keep[picked]", "return picked.copy()"),
    ),
    mistake(
        "all products begin an epoch at the same place",
        ORDER,
        (PLAN, "(rank + start[group]) / counts[group]", "(rank + 0.5) / counts[group]"),
    ),
    mistake(
        "the seed does not decide the augmentation",
        AUGMENTED,
        (AUGMENT, "random_words(seed, AUGMENT_STREAM", "random_words(0, AUGMENT_STREAM"),
    ),
    # -- batches
    mistake(
        "empty slots counted as frames",
        BATCH,
        (CLIPS, 'arrays["mask"][position, :shown] = 1', 'arrays["mask"][position, :] = 1'),
    ),
    mistake(
        "augmentation by the position in the batch, not by the clip",
        BATCH,
        (
            CLIPS,
            'self._fill_slots(arrays["frames"][position], row, epoch)',
            'self._fill_slots(arrays["frames"][position], position, epoch)',
        ),
    ),
    mistake(
        "all frames of a clip cropped alike",
        BATCH,
        (CLIPS, "(0 if self.options.consistent_augment else slot)", "0"),
    ),
    mistake(
        "a resumed run begins with the first batch again",
        BATCH,
        (BATCHES, "step = start_step + batch", "step = batch"),
    ),
    mistake(
        "shop image of a padding row is loaded",
        BATCH,
        (CLIPS, "            if row != PADDING:\n", "            if True:\n"),
    ),
    mistake(
        "crop and mirror by each other's random words",
        AUGMENTED,
        (AUGMENT, "CROP_Y, CROP_X, FLIP, AREA", "FLIP, CROP_X, CROP_Y, AREA"),
    ),
    mistake(
        "Grain prepares batches without bound",
        BATCH,
        (BATCHES, "prefetch_buffer_size=ahead if threads else 0", "prefetch_buffer_size=500"),
    ),
    # -- pictures
    mistake(
        "pictures turned the other way",
        (*KINDS, *DECODED),
        (METADATA, "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90"),
        (METADATA, "8: Image.Transpose.ROTATE_90", "8: Image.Transpose.ROTATE_270"),
    ),
    mistake("transparent pixels on black", KINDS, (DECODE, 'rgb.size, "white")', 'rgb.size, "black")')),
    mistake("more than 8 bits clipped", KINDS, (DECODE, "(values >> (bits - 8)).clip", "values.clip")),
    mistake(
        "lost parts of a JPEG accepted",
        ("tests/input/test_damage.py",),
        (DECODE, "if strict and DAMAGED.search", "if False and DAMAGED.search"),
    ),
    # -- processes
    mistake(
        "a worker outlives its parent if a sibling holds the sentinel",
        ("tests/system/test_processes.py", "-k", "sibling"),
        (PROCESSES, "while os.getppid() == parent.pid and not", "while not"),
    ),
    mistake(
        "a lease is taken over though its holder runs",
        ("tests/system/test_lease.py",),
        (LEASE, "if runs is False or time.monotonic() - since >= self._dead_seconds:", "if True:"),
        (LEASE, "if holder and (runs or (watched", "if holder and ((watched"),
    ),
)
