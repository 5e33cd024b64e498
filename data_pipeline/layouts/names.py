"""Names of files and folders: those that machines leave behind, and the characters that an id may have."""

import re
import unicodedata

LEFTOVERS = re.compile(
    r"""(
    \._.* | \.ds_store | \.apdisk | \.localized | icon\r | __macosx | \.appledouble | \.lsoverride | \.com\.apple\..*
    | \.spotlight-v100 | \.fseventsd | \.documentrevisions-v100 | \.temporaryitems | \.volumeicon\.icns
    | \.appledb | \.appledesktop | network\ trash\ folder | temporary\ items
    | thumbs\.db(:encryptable)? | ehthumbs(_vista)?\.db | desktop\.ini | \$recycle\.bin
    | system\ volume\ information | msocache | found\.\d{3} | ~\$.* | .*\.lnk
    | \.trash(es|-.*)? | \.(trashed|pending)-.* | lost\+found | \.nfs.* | \.fuse_hidden.* | \.smbdelete.*
    | \.goutputstream-.* | \.directory | \.nomedia | \.gvfs | \.cache | \.~lock\..*
    | @eadir | \#recycle | \#snapshot | @recycle | @recently-snapshot | \.@__.* | \.@upload_cache | @sharebin
    | \.thumb(s|nails|data.*)? | \.picasa\.ini | picasa\.ini | \.picasaoriginals | \.pics | \.snapshots?
    | \.ipynb_checkpoints | __pycache__ | \.pytest_cache | \.(idea|vscode|vs|venv|tox|mypy_cache|ruff_cache)
    | \.git | \.git(ignore|attributes|keep|modules) | \.svn | \.hg(ignore)? | \.bzr | \.dvc(ignore)? | \.keep
    | .*\.sync-conflict-.* | .*\(.*conflicted\ copy.*\).* | \.stfolder.* | \.stversions | \.stignore
    | \.?~?syncthing[.~].* | \.sync(_.*\.db.*)? | \.dropbox(\.cache|\.device|\.attr)?
    | \.tmp\.drive(up|down)load | \.owncloudsync\.log.*
    | \.nextcloudsync\.log | \._sync_.* | \.rsync-.*
    | .*\.(part|partial|filepart|crdownload|download|opdownload|tmp|temp|aria2|!ut|!qb|swp|swo|swx|bak|orig|rej) | .*~
    )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


def is_leftover(name: str) -> bool:
    """Returns whether a file or folder of this name was made by a machine and not by the user, so it is passed over.

    Examples are .DS_Store, Thumbs.db, @eaDir, .ipynb_checkpoints, lost+found, "IMG.jpg.part" and "~$list.csv". The name
    alone decides, whether it is a file's or a folder's, and whether its letters are capitals.
    """
    return LEFTOVERS.fullmatch(name) is not None


def has_control_characters(text: str) -> bool:
    """Returns whether a text has control characters (tab, line end, NUL) or lone surrogates, which UTF-8 cannot write.

    All else may be in an id, printable or not: narrow spaces, joiners of emoji, marks of the writing direction.
    """
    return any(unicodedata.category(each) in ("Cc", "Cs") for each in text)
