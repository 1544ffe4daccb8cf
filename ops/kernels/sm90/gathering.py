"""Pieces of eight elements of a matrix whose rows are picked by an index."""

from cutlass import Int32, Int64, cute

from dsv4_compile.ops.kernels.sm90 import numerics


@cute.jit
def gathered_piece(piece, row_pieces, rows_at, row_multiplier, row_shift, index_multiplier, index_shift) -> Int64:
    """The piece of the source that a piece of the result is, or -1 for those of a negative index.

    Args:
        piece: its number in the result.
        row_pieces: pieces of a row.
        rows_at: address of the index, an int32 a row of the result.
        row_multiplier, row_shift: of a division by ``row_pieces``, see ``ops/dispatch/division.py``.
        index_multiplier, index_shift: of the division that makes a row of the source of an index.
    """
    row = numerics.quotient(piece, row_multiplier, row_shift)
    index = Int32(numerics.load_words(rows_at + Int64(row) * 4, 1)[0])
    source = Int64(-1)
    if index >= 0:
        source_row = numerics.quotient(index, index_multiplier, index_shift)
        source = Int64(source_row) * row_pieces + (piece - row * row_pieces)
    return source
