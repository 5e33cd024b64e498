"""Names of files and folders: those that machines leave behind, and the characters that an id may have."""

import re
import unicodedata

FLAGS = re.VERBOSE | re.IGNORECASE | re.DOTALL
KNOWN = re.compile(  # names that no person gives
    r"""
    \._.* | \.ds_store | \.apdisk | \.localized | icon\r | __macosx | \.appledouble | \.lsoverride | \.com\.apple\..*
    | \.spotlight-v100 | \.fseventsd | \.documentrevisions-v100 | \.temporaryitems | \.volumeicon\.icns
    | \.appledb | \.appledesktop | thumbs\.db(:encryptable)? | ehthumbs(_vista)?\.db | desktop\.ini | ~\$.*
    | \$recycle\.bin | system\ volume\ information | msocache | zbthumbnail\.info | picasa\.ini
    | \.trash(es|-.*)? | \.(trashed|pending)-.* | lost\+found | \.nfs.* | \.fuse_hidden.* | \.smbdelete.*
    | \.goutputstream-.* | \.directory | \.nomedia | \.gvfs | \.cache | \.~lock\..*
    | @(eadir|tmp|recycle|recently-snapshot|sharebin|syno.*) | \#(recycle|snapshot) | syno(file|photo)_thumb.*
    | \.@__.* | \.@upload_cache | \.thumb(s|nails|data.*)? | \.picasa\.ini | \.picasaoriginals | \.pics | \.snapshots?
    | __pycache__ | \.(ipynb_checkpoints|pytest_cache|mypy_cache|ruff_cache|idea|vscode|vs|venv|tox)
    | \.git(ignore|attributes|keep|modules)? | \.svn | \.hg(ignore)? | \.bzr | \.dvc(ignore)? | \.keep
    | \.stfolder.* | \.stversions | \.stignore | \.?~?syncthing[.~].* | \.sync(_.*\.db.*)?
    | \.dropbox(\.cache|\.device|\.attr)? | \.tmp\.drive(up|down)load | \.(own|next)cloudsync\.log.* | \.rsync-.*
    """,
    FLAGS,
)
FOLDERS = re.compile(
    r"recycle[rd] | network\ trash\ folder | temporary\ items | found\.\d{3} | node_modules | captureone | .*\.lrdata",
    FLAGS,
)
FILES = re.compile(
    r"""
    .*\.(part|partial|filepart|crdownload|download|opdownload|tmp|temp|aria2|!ut|!qb|swp|swo|swx|bak|orig|rej|lnk) | .*~
    | .*\.sync-conflict-.* | .*\(.*conflicted\ copy.*\).*
    """,
    FLAGS,
)


def is_known_leftover(name: str) -> bool:
    """Returns whether no person gives this name: .DS_Store, Thumbs.db, @eaDir, lost+found, "~$list.csv" and so on.

    Capitals do not matter.
    """
    return KNOWN.fullmatch(name) is not None


def is_leftover(name: str, is_folder: bool) -> bool:
    """Returns whether an entry is passed over: it is hidden, or a program left it behind, as its name says.

    Hidden names begin with a dot. The others are those of `is_known_leftover`; of files those that are unfinished or
    spare copies, such as "IMG.jpg.part" and "a.jpg~"; and of folders CaptureOne, node_modules and so on.
    """
    return name.startswith(".") or is_known_leftover(name) or bool((FOLDERS if is_folder else FILES).fullmatch(name))


def has_control_characters(text: str) -> bool:
    """Returns whether a text has control characters (tab, line end, NUL) or lone surrogates, which UTF-8 cannot write.

    All else may be in an id, printable or not: narrow spaces, joiners of emoji, marks of the writing direction.
    """
    # LPR4M has 473 million names, nearly all of them printable.
    return not text.isprintable() and any(unicodedata.category(each) in ("Cc", "Cs") for each in text)
