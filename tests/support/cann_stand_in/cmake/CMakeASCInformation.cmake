# The rules for objects and shared libraries, by version as README.md's table says.
include(CMakeCommonLanguageInclude)
include("${CMAKE_CURRENT_LIST_DIR}/version.cmake")

set(CMAKE_ASC_OUTPUT_EXTENSION .o)
set(CMAKE_INCLUDE_FLAG_ASC "-I")
set(CMAKE_SHARED_LIBRARY_CREATE_ASC_FLAGS "${CMAKE_SHARED_LIBRARY_CREATE_C_FLAGS}")
set(CMAKE_SHARED_LIBRARY_SONAME_ASC_FLAG "${CMAKE_SHARED_LIBRARY_SONAME_C_FLAG}")

if(STAND_IN_VERSION VERSION_LESS 9.0)
  set(language "-fPIC -x asc")
elseif(STAND_IN_VERSION VERSION_LESS 9.1)
  set(language "-fPIC --asc-aicore-lang")
else()
  set(language "-std=c++17 --asc-aicore-lang")
  set(CMAKE_ASC_COMPILE_OPTIONS_PIC "-fPIC")
  set(CMAKE_ASC_FLAGS_RELEASE_INIT "-O3 -DNDEBUG")
  cmake_initialize_per_config_variable(CMAKE_ASC_FLAGS "Flags used by the ASC compiler")
endif()
set(CMAKE_ASC_COMPILE_OBJECT "<CMAKE_ASC_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -o <OBJECT> -c ${language} <SOURCE>")
set(CMAKE_ASC_CREATE_SHARED_LIBRARY
  "<CMAKE_ASC_COMPILER> <LANGUAGE_COMPILE_FLAGS> <LINK_FLAGS> <CMAKE_SHARED_LIBRARY_CREATE_ASC_FLAGS> <SONAME_FLAG><TARGET_SONAME> -o <TARGET> <OBJECTS> <LINK_LIBRARIES>")
set(CMAKE_ASC_INFORMATION_LOADED 1)
