"""`echelon trace`: timelines of a pipeline, executed or planned, as numbers, a picture and a trace for Perfetto."""
