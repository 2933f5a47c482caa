"""Operations beside attention, under their published paths."""
